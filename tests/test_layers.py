"""Layers: each is its plain form, and goes the way that is meant to cost less."""

from __future__ import annotations

import itertools

import pytest
import torch
from torchvision.ops import FrozenBatchNorm2d

from boxinst import layers


def test_fixed_norm_is_frozen_batch_norm():
    ours, theirs = layers.FixedNorm(6), FrozenBatchNorm2d(6)
    theirs.load_state_dict({name: torch.rand(6) + 0.5 for name in ours.state_dict()})
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 6, 5, 7).requires_grad_()
    torch.testing.assert_close(ours(x), theirs(x))
    gradients = (torch.autograd.grad(norm(x).square().sum(), x)[0] for norm in (ours, theirs))
    torch.testing.assert_close(*gradients)
    assert ours(x.bfloat16()).dtype == torch.bfloat16


def ran(run) -> set[str]:
    """The names of the operators that PyTorch ran."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        run()
    return {event.name for event in profiler.events()}


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(1, 6, 33, 40), (2, 6, 34, 41), (2, 6, 3, 5), (0, 6, 32, 32)])
def test_pointwise_is_a_convolution(shape, layout, bias, stride):
    conv = torch.nn.Conv2d(6, 10, 1, stride=stride, bias=bias)
    x = torch.randn(shape).to(memory_format=layout)
    outs = {}
    for name in ("pointwise", "reference"):
        net = conv.to(torch.float32) if name == "pointwise" else conv.to(torch.float64)
        net.__class__ = layers.Pointwise if name == "pointwise" else torch.nn.Conv2d
        given = x.to(net.weight.dtype).requires_grad_()
        out = net(given)
        outs[name] = [out, *torch.autograd.grad(out.square().sum(), [given, *net.parameters()])]
    for ours, exact in zip(outs["pointwise"], outs["reference"], strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-4)


FILTERING = "_Filtering"
LEVELS = [(25, 21), (13, 9), (7, 5), (3, 2), (1, 1)]


def relative_error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    return float((ours.detach().double() - exact).abs().max() / exact.abs().max())


def results(conv, features, directions) -> list[torch.Tensor]:
    """What a convolution gives for each of the features, and the gradients of features and parameters."""
    given = [x.detach().requires_grad_() for x in features]
    outs = conv.each(given) if isinstance(conv, layers.Conv3x3) else [conv(x) for x in given]
    gradients = torch.autograd.grad(outs, [*given, *conv.parameters()], [d.to(outs[0].dtype) for d in directions])
    return [out.detach() for out in outs] + list(gradients)


def exact_results(conv, features, directions) -> list[torch.Tensor]:
    """The same by PyTorch's convolution in float64."""
    inputs, outputs, bias = conv.in_channels, conv.out_channels, conv.bias is not None
    reference = torch.nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias, dtype=torch.float64)
    reference.load_state_dict(conv.state_dict())
    return results(reference, [x.double() for x in features], directions)


@pytest.mark.parametrize("at_once", [None, 3000])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("n", "inputs", "outputs", "sizes"),
    [
        (1, 80, 96, [(20, 25)]),
        (3, 96, 80, [(23, 22)]),
        (1, 128, 128, [(32, 40)]),
        (1, 80, 80, [(4, 161)]),
        (2, 160, 80, LEVELS),
    ],
)
def test_convolution_for_training_is_a_convolution(n, inputs, outputs, sizes, layout, bias, at_once, monkeypatch):
    if at_once:  # few tiles go together, and in the row of 161 cells fewer than it has
        monkeypatch.setattr(layers, "_AT_ONCE", at_once)
    torch.manual_seed(0)
    conv = layers.Conv3x3(inputs, outputs, bias=bias).to(memory_format=layout)
    features = [torch.randn(n, inputs, *size).relu().to(memory_format=layout) for size in sizes]
    directions = [torch.randn(n, outputs, *size) for size in sizes]
    ours, exact = (of(conv, features, directions) for of in (results, exact_results))
    assert [x.shape for x in ours] == [x.shape for x in exact]
    assert max(map(relative_error, ours, exact)) < 3e-5
    assert FILTERING in ran(lambda: conv.each(features))
    again = results(conv, features, directions)
    assert all(map(torch.equal, ours, again)), "the same twice"


def test_rows_of_tiles_are_worked_on_once_each():
    shapes = [torch.Size((n, 1, h, w)) for n, h, w in [(2, 33, 17), (1, 4, 100), (3, 1, 1), (1, 8, 8)]]
    for limit in (1, 5, 12, 1000):
        seen = []
        parcels = list(layers._strips(shapes, limit))
        for (_, tiles), (following, _) in itertools.pairwise(parcels):
            assert tiles + following[0].across > limit, "no parcel has room for the next row"
        for parcel, tiles in parcels:
            assert tiles == sum(strip.rows * strip.across for strip in parcel)
            assert tiles <= limit or (len(parcel) == 1 and parcel[0].rows == 1)
            assert [s.start for s in parcel] == [sum(t.rows * t.across for t in parcel[:k]) for k in range(len(parcel))]
            seen += [(s.features, s.image, s.first + row) for s in parcel for row in range(s.rows)]
        rows = [-(-shape[2] // 4) for shape in shapes]
        assert seen == [
            (k, n, row) for k, shape in enumerate(shapes) for n in range(shape[0]) for row in range(rows[k])
        ]


def test_convolution_of_a_batch_and_of_levels_is_that_of_each():
    torch.manual_seed(0)
    conv = layers.Conv3x3(80, 80)
    images = [torch.randn(3, 80, 23, 22), torch.randn(3, 80, 20, 30)]
    together = conv.each(images)
    for batch, outs in zip(images, together, strict=True):
        torch.testing.assert_close(torch.cat([conv(image[None]) for image in batch]), outs, rtol=0, atol=2e-5)
    turned = conv.each([batch.flip(0) for batch in images[::-1]])
    for outs, expected in zip(turned[::-1], together, strict=True):
        torch.testing.assert_close(outs.flip(0), expected, rtol=0, atol=2e-5)


def test_what_is_frozen_gets_no_gradient_and_the_rest_gets_the_same():
    torch.manual_seed(0)
    conv = layers.Conv3x3(80, 80)
    features = [torch.randn(1, 80, 23, 22), torch.randn(1, 80, 12, 11)]
    directions = [torch.randn_like(x) for x in features]
    of_first, _, of_weight, of_bias = results(conv, features, directions)[2:]
    features[0].requires_grad_()
    torch.autograd.backward(conv.each(features), directions)
    assert features[1].grad is None
    for found, expected in ((features[0].grad, of_first), (conv.weight.grad, of_weight), (conv.bias.grad, of_bias)):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    first = features[0].grad
    conv.zero_grad()
    conv.requires_grad_(False)
    features[0].grad = None
    torch.autograd.backward(conv.each(features), directions)
    torch.testing.assert_close(features[0].grad, first, rtol=0, atol=0)
    conv.requires_grad_(True)
    torch.autograd.backward(conv.each([x.detach() for x in features]), directions)
    torch.testing.assert_close(conv.weight.grad, of_weight, rtol=0, atol=0)


def test_only_training_takes_the_coarser_rounding():
    conv = layers.Conv3x3(80, 80)
    plain = torch.nn.Conv2d(80, 80, 3, padding=1)
    plain.load_state_dict(conv.state_dict())
    x = torch.randn(1, 80, 23, 22)
    assert FILTERING in ran(lambda: conv(x))

    def same(given=x) -> bool:
        assert FILTERING not in ran(lambda: conv(given))
        return torch.equal(conv(given), plain(given))

    with torch.no_grad():
        assert same()
    conv.eval()
    assert same(), "not in training, though gradients are on"
    conv.train()
    assert same(x[..., :12]), "few cells"
    assert same(x[:0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same()


@pytest.mark.parametrize("threads", [1, 2])
def test_pointwise_is_one_product_of_matrices(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x = torch.randn(2, 16, 24, 24).to(memory_format=torch.channels_last)
        conv = layers.Pointwise(16, 8, 1, bias=False).to(memory_format=torch.channels_last)
        names = ran(lambda: conv(x))
        assert "aten::mm" in names
        assert not names & {"aten::copy_", "aten::clone"}, "the pixels are a view"
        assert conv(x).is_contiguous(memory_format=torch.channels_last)
    finally:
        torch.set_num_threads(before)
