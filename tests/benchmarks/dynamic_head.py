"""Time and memory of the dynamic mask head over whole maps, against the published grouped 1×1 convolutions.

    python tests/benchmarks/dynamic_head.py
    python tests/benchmarks/dynamic_head.py --instances 16 --grid 32 40

Both ways get the same features and parameters and must give the same logits and gradients. A logit is compared by its
largest difference relative to the largest absolute value, the gradients by the length of the difference relative to
their length: a ReLU whose input is 0 but for rounding may open in one of them alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import measure
import torch
import torch.nn.functional as F
from losses import difference
from torch import Tensor

from boxinst.dynamic import HeadShape, dynamic_masks

STRIDE = 8


def plain_masks(
    features: Tensor, image_index: Tensor, parameters: Tensor, points: Tensor, scales: Tensor, head: HeadShape
) -> Tensor:
    """``dynamic_masks`` as published: a copy of the features and a map of coordinates for each instance, through
    convolutions with one group for each.

    Args:
        features: [N, C, h, w].
        image_index: [P] int64.
        parameters: [P, K].
        points: [P, 2] pixels.
        scales: [P, 2] pixels.
        head: sizes of the dynamic head.

    Returns:
        [P, h, w] logits.
    """
    (h, w), count = features.shape[2:], len(parameters)
    x = (torch.arange(w, device=features.device) + 0.5) * STRIDE
    y = (torch.arange(h, device=features.device) + 0.5) * STRIDE
    cells = torch.stack([x.repeat(h), y.repeat_interleave(w)], 1)  # [h·w, 2]
    relative = (points[:, None] - cells) / scales[:, None]  # [P, h·w, 2]
    own = features[image_index].flatten(2)  # [P, C, h·w]
    maps = torch.cat([relative.transpose(1, 2).to(own.dtype), own], 1).reshape(1, -1, h, w)
    for k, (weight, bias) in enumerate(head.split(parameters)):
        maps = F.conv2d(maps, weight.flatten(0, 1)[:, :, None, None], bias.flatten(), groups=count)
        if k < head.layers - 1:
            maps = maps.relu()
    return maps[0]


def main() -> int:
    """Measure and print the table."""
    parser = measure.arguments(__doc__, repeats=9)
    parser.add_argument("--instances", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--channels", type=int, default=16, help="of the mask features (default: %(default)s)")
    parser.add_argument(
        "--grid", type=int, nargs=2, default=(100, 152), metavar=("H", "W"), help="cells (default: 100 152)"
    )
    args = measure.parse(parser)
    (h, w), count, device = args.grid, args.instances, args.device
    head, g = HeadShape(args.channels), torch.Generator().manual_seed(0)
    features = torch.randn(1, args.channels, h, w, generator=g).to(device).requires_grad_()
    parameters = (torch.randn(count, head.num_parameters, generator=g) * 0.3).to(device).requires_grad_()
    points = (torch.rand(count, 2, generator=g) * torch.tensor([w, h]) * STRIDE).to(device)
    scales = torch.full((count, 2), 128.0, device=device)
    index = torch.zeros(count, dtype=torch.int64, device=device)
    weights = torch.randn(count, h, w, generator=g).to(device)

    def plain() -> Tensor:
        return plain_masks(features, index, parameters, points, scales, head)

    def ours() -> Tensor:
        return dynamic_masks(features, [0] * count, parameters, points, scales, head=head, stride=STRIDE)

    def alone(way: Callable[[], Tensor]) -> Tensor:
        with torch.no_grad():
            return way()

    def and_back(way: Callable[[], Tensor]) -> Tensor:
        features.grad = parameters.grad = None
        way().backward(weights)
        assert features.grad is not None
        assert parameters.grad is not None
        return torch.cat([features.grad.flatten(), parameters.grad.flatten()])

    gradient, plain_gradient = and_back(ours), and_back(plain)
    apart = {
        "forward": difference(alone(ours), alone(plain)),
        "forward and backward": f"{float((gradient - plain_gradient).norm() / plain_gradient.norm()):.0e}",
    }
    rows = []
    for name, run in (("forward", alone), ("forward and backward", and_back)):
        ways = {"plain": lambda run=run: run(plain), "ours": lambda run=run: run(ours)}
        time = measure.seconds(ways, args.repeats, device)
        memory = {}
        for way, call in ways.items():
            features.grad = parameters.grad = None
            memory[way] = measure.peak_allocated(call, device)
        rows.append(
            [
                name,
                *(f"{time['plain'] * 1000:.0f}", f"{time['ours'] * 1000:.0f}", f"{time['plain'] / time['ours']:.1f}"),
                *(f"{memory['plain']:.0f}", f"{memory['ours']:.0f}", f"{memory['plain'] / memory['ours']:.1f}"),
                apart[name],
            ]
        )
    header = ["", "plain ms", "ours ms", "ratio", "plain MiB", "ours MiB", "ratio", "Δ"]
    about = f"{count} instances × {args.channels} channels × {h}×{w} cells, {args.threads} thread(s), {device}"
    print(f"Dynamic mask head, {about}\n\n{measure.table(header, rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
