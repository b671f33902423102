"""One rank of data-parallel training without Ray, on a batch that follows from a seed: for tests of the gradients.

As a program, ``python ranks.py RANK FILE``, it is one of two ranks, which meet through ``FILE``.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn

from boxinst.condinst import CondInst
from boxinst.config import LossConfig, ModelConfig
from boxinst.criterion import Criterion
from boxinst.structures import Batch, Targets

SIDE = 64
INSTANCES = {"ragged": (3, 1, 0, 2), "one": (1, 0, 0, 0)}
"""Of each image of the global batch: no rank has as many as another, and fewer in all than there are ranks."""
CONFIGS = {
    head: ModelConfig(
        classes=("a", "b"),
        backbone="resnet18",
        width=16,
        fpn_channels=16,
        dense_layers=1,
        mask_branch_channels=16,
        mask_branch_layers=1,
        mask_stride=4,
        prompt=head == "prompt",
        detect=head == "detect",
        frozen_norm=True,  # a batch's own statistics would differ between a part and the whole
    )
    for head in ("prompt", "detect")
}
CASES = [(head, kind) for head in CONFIGS for kind in INSTANCES]


def batch(kind: str, images: list[int]) -> Batch:
    """These images of a global batch. Every second instance has a mask; a crop has cut the third of an image."""
    pixels, targets = [], []
    for number in images:
        generator = torch.Generator().manual_seed(number)
        pixels.append(torch.randint(90, 94, (3, SIDE, SIDE), dtype=torch.uint8, generator=generator))
        n = INSTANCES[kind][number]
        corner = torch.randint(0, 24, (n, 2), generator=generator)
        size = torch.randint(16, 40, (n, 2), generator=generator)
        boxes = torch.cat([corner, corner + size], 1)
        masks = torch.zeros(n, SIDE, SIDE, dtype=torch.bool)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.tolist(), strict=True):
            mask[y1:y2, x1:x2] = True
        targets.append(
            Targets(
                boxes.float(),
                torch.arange(n) % 2,
                masks,
                has_mask=torch.arange(n) % 2 == 1,
                tight=torch.arange(n) != 2,
            )
        )
    valid = torch.ones(len(images), SIDE, SIDE, dtype=torch.bool)
    return Batch(torch.stack(pixels), valid, targets, images, [(SIDE, SIDE)] * len(images))


def gradients(head: str, kind: str, images: list[int], *, parallel: bool) -> dict[str, Tensor]:
    """Of the loss of ``images``, by parameter; ``parallel``: averaged over the ranks of the process group."""
    torch.manual_seed(0)
    model: nn.Module = CondInst(CONFIGS[head]).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    if parallel:
        model = nn.parallel.DistributedDataParallel(model)
    part = batch(kind, images)
    outputs = model(part.images, [t.boxes for t in part.targets], part.sizes)
    Criterion(CONFIGS[head], LossConfig(warmup_steps=1))(outputs, part, step=5)["loss"].backward()
    named = (model.module if parallel else model).named_parameters()
    return {name: p.grad for name, p in named if p.grad is not None}


def as_rank(rank: int, meeting_place: str) -> dict[tuple[str, str], dict[str, Tensor]]:
    """Every averaged gradient as one of two ranks sees it; each takes its half of the images."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting_place}", rank=rank, world_size=2)
    try:
        return {case: gradients(*case, [2 * rank, 2 * rank + 1], parallel=True) for case in CASES}
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    as_rank(int(sys.argv[1]), sys.argv[2])
