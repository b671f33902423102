"""Time and memory of one mask for each of many given boxes.

    python tests/benchmarks/prompt.py
    python tests/benchmarks/prompt.py --boxes 4000 --mask-stride 2

The first table: boxes with sides of 16, 32, 64 and 128 pixels, mixed, on one image of 1,024×1,024, through `segment`,
with a ResNet-50 from random weights. Memory is that of the whole process (see measure.py). The order is kept when
every mask has pixels and all of them lie in the box of the same row.

The second table: milliseconds for each box by its side, of the prompt head, which reads the features in the box, and
of the mask itself.
"""

from __future__ import annotations

import argparse
import sys

import measure
import torch
from torch import Tensor

from boxinst import CondInst, ModelConfig
from boxinst.dynamic import box_masks
from boxinst.prompts import prompt_masks

SIDE = 1024
EACH = 100
"""Boxes of one side, in the second table."""


def squares(count: int, side: int, generator: torch.Generator) -> Tensor:
    """Boxes [count, 4] of one side anywhere in the image."""
    corner = torch.rand(count, 2, generator=generator) * (SIDE - side)
    return torch.cat([corner, corner + side], 1)


def many(model: CondInst, image: Tensor, args: argparse.Namespace) -> str:
    """The first table."""
    g, sizes = torch.Generator().manual_seed(1), (16, 32, 64, 128)
    boxes = torch.cat([squares(-(-args.boxes // len(sizes)), side, g) for side in sizes])
    boxes = boxes[torch.randperm(len(boxes), generator=g)[: args.boxes]]
    model.segment([image], [boxes[:1]])  # libraries take their memory at first use
    before, peak = measure.peak_resident(lambda: model.segment([image], [boxes]))
    ways = {"all": lambda: model.segment([image], [boxes]), "one": lambda: model.segment([image], [boxes[:1]])}
    time = measure.seconds(ways, args.repeats, args.device)
    masks = model.segment([image], [boxes])[0].masks
    inside = (box_masks(box[None], (SIDE, SIDE), 1)[0] for box in boxes)
    kept = all(bool(mask.any()) and not bool((mask & ~box).any()) for mask, box in zip(masks, inside, strict=True))
    per_box = (time["all"] - time["one"]) / max(len(boxes) - 1, 1) * 1000
    return measure.table(
        ["boxes", "seconds", "of one box", "ms per further box", "MiB before", "MiB at most", "growth", "order kept"],
        [
            [
                f"{len(boxes):,}",
                *(f"{time['all']:.2f}", f"{time['one']:.2f}", f"{per_box:.2f}"),
                *(f"{before:.0f}", f"{peak:.0f}", f"{peak - before:.0f}", "yes" if kept else "NO"),
            ]
        ],
    )


def by_side(model: CondInst, image: Tensor, args: argparse.Namespace) -> str:
    """The second table."""
    seen = image[None].to(args.device)
    features = model.fpn(model.backbone(model.normalize(seen, [(SIDE, SIDE)])))
    maps = model.mask_branch(features)
    heads, masks = {}, {}
    for side in (16, 32, 64, 128, 256, 512):
        boxes = squares(EACH, side, torch.Generator().manual_seed(side)).to(args.device)
        parameters = model.prompt_head(features, [boxes], (SIDE, SIDE))
        heads[str(side)] = lambda boxes=boxes: model.prompt_head(features, [boxes], (SIDE, SIDE))
        masks[str(side)] = lambda p=parameters, b=boxes: prompt_masks(model, maps, p, b, seen[0], image)
    rows = []
    for name, ways in (("prompt head", heads), ("mask", masks)):
        time = measure.seconds(ways, args.repeats, args.device)
        rows.append([name, *(f"{t / EACH * 1000:.2f}" for t in time.values())])
    return measure.table(["side of the box, pixels", *heads], rows)


@torch.no_grad()
def main() -> int:
    """Measure and print both tables."""
    parser = measure.arguments(__doc__, repeats=3)
    parser.add_argument("--boxes", type=int, default=1000, help="of the first table (default: %(default)s)")
    parser.add_argument("--mask-stride", type=int, default=8, help="2, 4 or 8 (default: %(default)s)")
    args = measure.parse(parser)
    torch.manual_seed(0)
    model = CondInst(ModelConfig(mask_stride=args.mask_stride)).to(args.device).eval()
    image = torch.randint(0, 256, (3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    about = f"mask stride {args.mask_stride}, {args.threads} thread(s), {args.device}"
    print(f"Masks of given boxes on {SIDE}×{SIDE} pixels, {about}\n")
    print(f"{many(model, image, args)}\n\nMilliseconds per box\n\n{by_side(model, image, args)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
