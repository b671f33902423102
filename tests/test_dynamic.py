"""The dynamic mask head equals the per-instance network of the paper, on maps and in windows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from boxinst import dynamic
from boxinst.dynamic import (
    HeadShape,
    aligned_upsample,
    box_masks,
    dynamic_mask_windows,
    dynamic_masks,
    gather_windows,
    upsample,
    window_groups,
)

HEAD = HeadShape(in_channels=5, channels=4, layers=3)


def reference(features, image_index, parameters, points, scales, stride):
    """One instance at a time, by the layers as CondInst states them: coordinates first, then features."""
    out = []
    for p, n in enumerate(image_index):
        _, h, w = features[n].shape
        y, x = torch.meshgrid(torch.arange(h).double(), torch.arange(w).double(), indexing="ij")
        rel = torch.stack(
            [
                (points[p, 0] - (x + 0.5) * stride) / scales[p, 0],
                (points[p, 1] - (y + 0.5) * stride) / scales[p, 1],
            ]
        )
        z = torch.cat([rel, features[n]])[None]
        start = 0
        weights, biases = [], []
        for i, o in HEAD.widths:
            weights.append(parameters[p, start : start + i * o].view(o, i, 1, 1))
            start += i * o
        for _, o in HEAD.widths:
            biases.append(parameters[p, start : start + o])
            start += o
        assert start == parameters.shape[1]
        for k in range(3):
            z = F.conv2d(z, weights[k], biases[k])
            z = z.relu() if k < 2 else z
        out.append(z[0, 0])
    return torch.stack(out)


@pytest.fixture
def case():
    g = torch.Generator().manual_seed(0)
    features = torch.randn(2, 5, 12, 16, generator=g, dtype=torch.float64)
    parameters = torch.randn(6, HEAD.num_parameters, generator=g, dtype=torch.float64)
    points = torch.rand(6, 2, generator=g, dtype=torch.float64) * 32
    scales = torch.rand(6, 2, generator=g, dtype=torch.float64) * 20 + 2
    return features, [0, 0, 0, 1, 1, 1], parameters, points, scales


def test_published_head_has_233_parameters():
    assert HeadShape(in_channels=16, channels=8, layers=3).num_parameters == 233


def test_maps_equal_the_reference(case):
    features, index, parameters, points, scales = case
    out = dynamic_masks(features, index, parameters, points, scales, head=HEAD, stride=2)
    torch.testing.assert_close(out, reference(features, index, parameters, points, scales, 2))


def test_gradients_equal_the_reference(case):
    features, index, parameters, points, scales = case
    grads = []
    for f in (
        lambda a, b: dynamic_masks(a, index, b, points, scales, head=HEAD, stride=2),
        lambda a, b: reference(a, index, b, points, scales, 2),
    ):
        a, b = features.clone().requires_grad_(), parameters.clone().requires_grad_()
        (f(a, b) ** 2).sum().backward()
        grads.append((a.grad, b.grad))
    torch.testing.assert_close(grads[0], grads[1])


def test_windows_equal_the_cut_out_map(case):
    features, index, parameters, points, scales = case
    full = dynamic_masks(features, index, parameters, points, scales, head=HEAD, stride=2)
    origins = torch.tensor([[0, 0], [3, 2], [8, 4], [1, 1], [8, 0], [5, 4]])
    image_index = torch.tensor(index)
    out = dynamic_mask_windows(features, image_index, parameters, points, scales, origins, (8, 8), head=HEAD, stride=2)
    cut = gather_windows(full[:, None], torch.arange(6), origins, (8, 8))[:, 0]
    torch.testing.assert_close(out, cut)


@pytest.mark.parametrize("at_once", [1, 2 * 12 * 16, 5 * 8 * 8])
def test_some_instances_at_a_time_give_what_all_at_once_give(case, monkeypatch, at_once):
    features, _, parameters, points, scales = case
    image_index = [0, 1, 1, 1, 1, 1]
    origins = torch.tensor([[0, 0], [3, 2], [8, 4], [1, 1], [8, 0], [5, 4]])

    def results():
        a, b = features.clone().requires_grad_(), parameters.clone().requires_grad_()
        maps = dynamic_masks(a, image_index, b, points, scales, head=HEAD, stride=2)
        windows = dynamic_mask_windows(
            a, torch.tensor(image_index), b, points, scales, origins, (8, 8), head=HEAD, stride=2
        )
        return maps, windows, *torch.autograd.grad((maps**2).sum() + (windows**3).sum(), (a, b))

    expected = results()
    monkeypatch.setattr(dynamic, "_CELLS_AT_ONCE", at_once)
    torch.testing.assert_close(results(), expected)


@pytest.mark.parametrize("index", [[1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]])
def test_an_image_may_have_no_instance(case, index):
    features, _, parameters, points, scales = case
    out = dynamic_masks(features, index, parameters, points, scales, head=HEAD, stride=2)
    torch.testing.assert_close(out, reference(features, index, parameters, points, scales, 2))


def test_no_instances_is_empty_and_differentiable(case):
    features, _, parameters, points, scales = case
    parameters = parameters[:0].clone().requires_grad_()
    none, index = torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    maps = dynamic_masks(features, [], parameters, points[:0], scales[:0], head=HEAD, stride=2)
    windows = dynamic_mask_windows(
        features, index, parameters, points[:0], scales[:0], none, (8, 8), head=HEAD, stride=2
    )
    assert maps.shape == (0, 12, 16)
    assert windows.shape == (0, 8, 8)
    (maps.sum() + windows.sum()).backward()
    assert parameters.grad.shape == parameters.shape


def test_window_groups_hold_every_box_once_and_cover_it():
    g = torch.Generator().manual_seed(1)
    start = torch.rand(50, 2, generator=g) * 100
    boxes = torch.cat([start, start + torch.rand(50, 2, generator=g) ** 3 * 90 + 0.1], 1)
    boxes[:, 2:] = boxes[:, 2:].clamp(max=120)
    groups = window_groups(boxes, (60, 60), 2, margin=4.0)
    assert sorted(torch.cat([x.members for x in groups]).tolist()) == list(range(50))
    for group in groups:
        assert bool((group.origins >= 0).all())
        assert bool((group.origins + torch.tensor(group.size[::-1]) <= 60).all())
        low, high = group.origins * 2, (group.origins + torch.tensor(group.size[::-1])) * 2
        b = boxes[group.members]
        assert bool((low <= (b[:, :2] - 4).clamp(min=0)).all())
        assert bool((high >= (b[:, 2:] + 4).clamp(max=120)).all())
    assert window_groups(boxes[:0], (60, 60), 2, margin=4.0) == []


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_aligned_upsample_follows_its_formula(factor):
    g = torch.Generator().manual_seed(2)
    x = torch.randn(3, 5, 7, generator=g, dtype=torch.float64)

    def source(count):
        j = torch.arange(count * factor, dtype=torch.float64)
        return ((j - factor // 2) / factor).clamp(0, count - 1)

    y, z = source(5), source(7)
    y0, z0 = y.floor().long(), z.floor().long()
    y1, z1 = (y0 + 1).clamp(max=4), (z0 + 1).clamp(max=6)
    wy, wz = (y - y0)[:, None], (z - z0)[None]
    expected = (
        x[:, y0][:, :, z0] * (1 - wy) * (1 - wz)
        + x[:, y0][:, :, z1] * (1 - wy) * wz
        + x[:, y1][:, :, z0] * wy * (1 - wz)
        + x[:, y1][:, :, z1] * wy * wz
    )
    torch.testing.assert_close(aligned_upsample(x, factor), expected)


def test_upsample_keeps_positions():
    # A linear ramp of positions stays one: away from the border each output says where its centre is.
    ramp = ((torch.arange(8) + 0.5) * 4).expand(1, 8, 8)
    out = upsample(ramp, 4)
    torch.testing.assert_close(out[0, 0, 4:-4], torch.arange(4, 28) + 0.5)


def test_box_masks_take_the_cells_whose_centre_is_inside():
    boxes = torch.tensor([[2.0, 1.0, 5.0, 4.0], [0.4, 0.0, 1.6, 2.0]])
    masks = box_masks(boxes, (6, 6), 1)
    assert masks[0].nonzero().tolist() == [[y, x] for y in (1, 2, 3) for x in (2, 3, 4)]
    assert masks[1].nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    window = box_masks(boxes[:1], (3, 3), 1, torch.tensor([[3, 2]]))
    torch.testing.assert_close(window[0], masks[0, 2:5, 3:6])


@pytest.mark.parametrize(
    "box", [[3.2, 3.2, 3.3, 3.3], [11.9, 11.9, 12.0, 12.0], [0.0, 0.0, 0.0, 0.0], [12.0, 5.0, 12.0, 6.0]]
)
@pytest.mark.parametrize("stride", [1, 4])
def test_no_box_is_too_small_for_a_target(box, stride):
    assert box_masks(torch.tensor([box]), (12 // stride, 12 // stride), stride).any()
