"""FCOS: features by level, assignment by its rules, and decoding back to boxes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from boxinst import backbone, fcos


def places(size=256):
    grids = [(math.ceil(size / 2**k), math.ceil(size / 2**k)) for k in fcos.DETECT_LEVELS]
    return fcos.locations(grids, torch.device("cpu")), grids


SILENT = fcos.Controllers([], torch.zeros(5, 1, 3, 3), torch.zeros(5))
"""For outputs whose boxes alone are looked at."""


def reference_assign(where, boxes):
    """The rules, one location and one box at a time."""
    out = []
    for (x, y), s, level in zip(where.points.tolist(), where.strides.tolist(), where.levels.tolist(), strict=True):
        best, best_area = -1, math.inf
        for k, (x0, y0, x1, y1) in enumerate(boxes.tolist()):
            cx, cy, r = (x0 + x1) / 2, (y0 + y1) / 2, 1.5 * s
            strictly_inside = x0 < x < x1 and y0 < y < y1
            near_centre = max(cx - r, x0) < x < min(cx + r, x1) and max(cy - r, y0) < y < min(cy + r, y1)
            low, high = fcos.REGRESSION_RANGES[level]
            in_range = low <= max(x - x0, y - y0, x1 - x, y1 - y) <= high
            area = (x1 - x0) * (y1 - y0)
            if strictly_inside and near_centre and in_range and area < best_area:
                best, best_area = k, area
        out.append(best)
    return torch.tensor(out)


def test_assign_follows_the_rules():
    g = torch.Generator().manual_seed(0)
    where, _ = places()
    start = torch.rand(12, 2, generator=g) * 150
    boxes = torch.cat([start, start + torch.rand(12, 2, generator=g) * 100 + 4], 1)
    boxes[0] = torch.tensor([0.0, 0.0, 30.0, 40.0])  # at column 0, which must not cost its positives
    got = fcos.assign(where, boxes)
    torch.testing.assert_close(got.instance, reference_assign(where, boxes))
    assert (got.instance == 0).any()
    positive = got.instance >= 0
    assert bool((got.centerness[positive] > 0).all())
    assert bool((got.centerness[~positive] == 0).all())
    assert bool((got.distances[positive] > 0).all())


def test_assign_is_indifferent_to_the_order_of_boxes():
    where, _ = places()
    boxes = torch.tensor([[10.0, 10, 60, 70], [100, 90, 200, 210], [30, 120, 50, 160]])
    order = torch.tensor([2, 0, 1])
    a, b = fcos.assign(where, boxes), fcos.assign(where, boxes[order])
    torch.testing.assert_close(torch.where(b.instance >= 0, order[b.instance], -1), a.instance)


def test_assign_without_boxes_is_all_background():
    where, _ = places()
    got = fcos.assign(where, torch.zeros(0, 4))
    assert bool((got.instance == -1).all())


def test_background_has_distances_of_which_every_loss_is_finite():
    where, _ = places()
    for boxes in (torch.tensor([[20.0, 30, 60, 90]]), torch.zeros(0, 4)):
        got = fcos.assign(where, boxes)
        assert got.distances[got.instance < 0].unique().tolist() == [1]
        assert got.centerness[got.instance < 0].unique().tolist() == [0]


def test_sample_positives_shares_evenly_and_takes_the_best():
    instance = torch.tensor([0] * 10 + [-1] * 5 + [1] * 3 + [2] * 10)
    scores = torch.rand(28, generator=torch.Generator().manual_seed(0))
    slots = fcos.sample_positives(instance, scores, limit=12, boxes=3)
    assert len(slots) == 12
    picked = slots[slots >= 0]
    assert torch.equal(slots[: len(picked)], picked)
    owners = instance[picked]
    assert [int((owners == k).sum()) for k in range(3)] == [4, 3, 4]
    for k in (0, 2):
        mine = (instance == k).nonzero().squeeze(1)
        best = mine[scores[mine].argsort(descending=True)[:4]]
        assert set(best.tolist()) == set(picked[owners == k].tolist())
    assert (fcos.sample_positives(instance, scores, limit=1, boxes=3) >= 0).tolist() == [True] * 3  # each keeps one
    assert fcos.sample_positives(torch.full((4,), -1), torch.rand(4), limit=5, boxes=2).tolist() == [-1] * 5


def test_decode_recovers_assigned_boxes():
    where, grids = places()
    boxes = torch.tensor([[20.0, 30, 60, 90], [100, 90, 200, 250]])
    labels = torch.tensor([2, 0])
    target = fcos.assign(where, boxes)
    positive = target.instance >= 0
    classes = torch.full((1, len(where.points), 3), -12.0)
    classes[0, positive, labels[target.instance[positive]]] = 12.0
    outputs = fcos.DenseOutputs(
        classes,
        target.distances[None].clamp(min=0),
        torch.logit(target.centerness, eps=1e-6)[None],
        SILENT,
        grids,
    )
    found = fcos.decode(outputs, 0, (256, 256))
    assert sorted(found.labels.tolist()) == [0, 2]
    for box, label in zip(boxes, labels, strict=True):
        torch.testing.assert_close(found.boxes[found.labels == label][0], box)


def test_the_controller_where_it_is_wanted_equals_the_one_everywhere():
    """Values and gradients, against the convolution over all of each level in double precision."""
    g = torch.Generator().manual_seed(0)
    grids = [(5, 7), (3, 4), (1, 2)]
    features = [torch.randn(2, 6, h, w, generator=g, dtype=torch.float64).requires_grad_() for h, w in grids]
    weight = torch.randn(11, 6, 3, 3, generator=g, dtype=torch.float64).requires_grad_()
    bias = torch.randn(11, generator=g, dtype=torch.float64).requires_grad_()
    given = [*features, weight, bias]
    everywhere = torch.cat([F.conv2d(x, weight, bias, padding=1).flatten(2) for x in features], 2).transpose(1, 2)
    every = torch.arange(49)
    twice_and_corners = torch.tensor([0, 6, 28, 34, 34, 35, 38, 46, 47, 48, 0])  # of all levels
    for where in (every, every.flip(0), twice_and_corners, every[:0]):
        for n in range(2):
            for layout in (torch.contiguous_format, torch.channels_last):
                laid = [x.contiguous(memory_format=layout) for x in features]
                got, wanted = fcos.Controllers(laid, weight, bias).at(n, where), everywhere[n, where]
                torch.testing.assert_close(got, wanted)
                factors = torch.randn(got.shape, generator=g, dtype=torch.float64)
                ours, theirs = (
                    torch.autograd.grad((x * factors).sum(), given, retain_graph=True) for x in (got, wanted)
                )
                torch.testing.assert_close(ours, theirs)


def test_decode_finds_nothing_in_silence():
    where, grids = places(64)
    count = len(where.points)
    outputs = fcos.DenseOutputs(
        torch.full((1, count, 1), -9.0), torch.ones(1, count, 4), torch.zeros(1, count), SILENT, grids
    )
    assert len(fcos.decode(outputs, 0, (64, 64)).boxes) == 0


def test_boxes_are_clipped_after_suppression_and_then_dropped():
    """Two boxes alike within the image alone are both kept; one of no area counts among the best and is dropped."""
    where, grids = places(64)
    count = len(where.points)
    classes = torch.full((1, count, 1), -12.0)
    distances = torch.full((1, count, 4), 1.0)
    first, second, third = 0, 1, 2  # neighbours on the finest level, at (4, 4), (12, 4) and (20, 4)
    classes[0, [first, second, third], 0] = torch.tensor([4.0, 3.0, 2.0])
    distances[0, first] = torch.tensor([1.0, 1.0, 60.0, 1.0])  # pixels −4 to 484
    distances[0, second] = torch.tensor([2.0, 1.0, 8.0, 1.0])  # pixels −4 to 76: the same part of the image
    distances[0, third] = 0
    outputs = fcos.DenseOutputs(classes, distances, torch.full((1, count), 9.0), SILENT, grids)
    found = fcos.decode(outputs, 0, (64, 64))
    assert found.location.tolist() == [first, second]
    torch.testing.assert_close(found.boxes, torch.tensor([[0.0, 0, 64, 12], [0, 0, 64, 12]]))
    assert len(fcos.decode(outputs, 0, (64, 64), max_detections=2).boxes) == 2
    classes[0, third, 0] = 6.0
    assert fcos.decode(outputs, 0, (64, 64), max_detections=2).location.tolist() == [first]


def test_suppression_keeps_the_classes_apart_where_coordinates_are_negative():
    where, grids = places(64)
    count = len(where.points)
    classes = torch.full((1, count, 3), -12.0)
    classes[0, 0] = torch.tensor([5.0, 4.0, 3.0])  # one location, all three classes
    distances = torch.tensor([30.0, 30.0, 0.5, 0.5]).repeat(1, count, 1)  # nearly all of it beyond the image
    outputs = fcos.DenseOutputs(classes, distances, torch.full((1, count), 9.0), SILENT, grids)
    assert fcos.decode(outputs, 0, (64, 64)).labels.tolist() == [0, 1, 2]


def test_sampling_centers_are_centres_of_gravity_of_whole_pixels():
    boxes = torch.tensor([[10.3, 4.9, 20.8, 9.1], [50.0, 0.0, 64.0, 48.0], [1.0, 1.0, 9.0, 9.0]])
    masks = torch.zeros(3, 48, 64, dtype=torch.bool)
    masks[2, 2:4, 5] = True
    masks[2, 2, 6] = True
    wanted = []
    for n, (x0, y0, x1, y1) in enumerate(boxes.tolist()):
        drawn = torch.zeros(48, 64)
        drawn[int(y0) : int(y1) + 1, int(x0) : int(x1) + 1] = 1
        if masks[n].any():
            drawn = masks[n].float()
        y, x = drawn.nonzero().float().mean(0)
        wanted.append([float(x), float(y)])
    torch.testing.assert_close(fcos.sampling_centers(boxes, (48, 64), masks), torch.tensor(wanted))
    assert len(fcos.sampling_centers(torch.zeros(0, 4), (48, 64), torch.zeros(0, 48, 64, dtype=torch.bool))) == 0


@pytest.mark.parametrize(("name", "channels"), [("resnet18", 512), ("resnet50", 2048)])
def test_resnet_gives_features_by_stride(name, channels):
    net = backbone.ResNet(name, 64, frozen_norm=False)
    out = net(torch.zeros(1, 3, 64, 64))
    assert {k: v.shape[-1] for k, v in out.items()} == {1: 32, 2: 16, 3: 8, 4: 4, 5: 2}
    assert out[5].shape[1] == channels
    assert {k: v.shape[1] for k, v in out.items()} == net.channels


def test_slim_resnet_is_narrower_everywhere():
    net = backbone.ResNet("resnet18", 16, frozen_norm=False)
    assert net(torch.zeros(2, 3, 64, 64))[5].shape[1] == 128
