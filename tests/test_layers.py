"""Layers: each is its plain form, and goes the way that is meant to cost less."""

from __future__ import annotations

import pytest
import torch
from torchvision.ops import FrozenBatchNorm2d

from boxinst import layers

NNPACK = "aten::_nnpack_spatial_convolution"


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


@pytest.fixture
def one_thread():
    """Torch with one thread on the CPU."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
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


@pytest.mark.usefixtures("one_thread")
@pytest.mark.skipif(not layers.HAS_NNPACK, reason="no NNPACK for this processor")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "shape", [(1, 80, 20, 25, 96), (3, 96, 23, 22, 80), (1, 128, 32, 40, 128), (1, 256, 25, 21, 80)]
)
def test_convolution_for_training_is_a_convolution(shape, layout, bias):
    n, inputs, h, w, outputs = shape
    torch.manual_seed(0)
    conv = layers.Conv3x3(inputs, outputs, bias=bias).to(memory_format=layout)
    x = torch.randn(n, inputs, h, w).relu().to(memory_format=layout)
    direction = torch.randn(n, outputs, h, w)
    reference = torch.nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias, dtype=torch.float64)
    reference.load_state_dict(conv.state_dict())
    outs = {}
    for name, net in (("ours", conv), ("reference", reference)):
        given = x.to(net.weight.dtype).requires_grad_()
        out = net(given)
        outs[name] = [out, *torch.autograd.grad(out, [given, *net.parameters()], direction.to(out.dtype))]
    for ours, exact in zip(outs["ours"], outs["reference"], strict=True):
        error = (ours.double() - exact).abs().max() / exact.abs().max()
        assert error < 3e-5
    assert NNPACK in ran(lambda: conv(x))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.skipif(not layers.HAS_NNPACK, reason="no NNPACK for this processor")
def test_convolution_of_a_batch_is_that_of_its_images_and_frozen_weights_get_no_gradient():
    torch.manual_seed(0)
    conv = layers.Conv3x3(80, 80)
    x = torch.randn(3, 80, 23, 22, requires_grad=True)
    together = conv(x)
    torch.testing.assert_close(together, torch.cat([conv(image[None]) for image in x]), rtol=0, atol=0)
    torch.testing.assert_close(together, conv(x), rtol=0, atol=0)
    (expected,) = torch.autograd.grad(together.square().sum(), x)
    conv.requires_grad_(False)
    conv(x).square().sum().backward()
    torch.testing.assert_close(x.grad, expected, rtol=0, atol=0)
    assert conv.weight.grad is None


@pytest.mark.usefixtures("one_thread")
def test_only_training_takes_the_coarser_rounding():
    conv = layers.Conv3x3(80, 80)
    plain = torch.nn.Conv2d(80, 80, 3, padding=1)
    plain.load_state_dict(conv.state_dict())
    x = torch.randn(1, 80, 23, 22)

    def same(given=x) -> bool:
        assert NNPACK not in ran(lambda: conv(given))
        return torch.equal(conv(given), plain(given))

    with torch.no_grad():
        assert same()
    conv.eval()
    assert same(), "not in training, though gradients are on"
    conv.train()
    assert same(x[..., :21]), "few pixels"
    assert same(x[:0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same()
    torch.set_num_threads(2)
    assert same()


@pytest.mark.usefixtures("one_thread")
def test_pointwise_of_one_thread_takes_the_fast_library():
    x = torch.randn(2, 16, 24, 24).to(memory_format=torch.channels_last)
    conv = layers.Pointwise(16, 8, 1).to(memory_format=torch.channels_last)
    names = ran(lambda: conv(x))
    assert "aten::mkldnn_convolution" in names
    assert not names & {"aten::copy_", "aten::clone"}, "the rows are a view"
    assert conv(x).is_contiguous(memory_format=torch.channels_last)
