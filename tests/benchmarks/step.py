"""Time and memory of a whole training step, against the same network with plain mask losses.

    python tests/benchmarks/step.py
    python tests/benchmarks/step.py --sizes 800x1216 --batches 2 8 16 --device cuda --amp

The network is the published one (FCOS and dynamic masks, 80 classes; fixed normalisation, stem and first stage not
trained) with random weights, the images are drawn, and each has 8 boxes of the size of COCO's objects. A step is
forward, loss, backward and SGD at a learning rate of 0, so that every step sees the same weights. The plain step does
as the published program: channels before pixels in memory, PyTorch's own loop over the parameters in SGD, fixed
normalisation as a product and a sum, the controller at every location, and the mask losses over whole maps, with
features and coordinates copied for each instance and grouped convolutions, the similarities copied for each instance,
and the pairwise loss unfolded (losses.py, dynamic_head.py). `laid out` is the plain step with the layout of memory and
the SGD of ours, which is what is left of the gain when those are not counted. All losses must be equal: Δ is the
largest relative difference from ours.

`loss` is the share of our step that is not network and optimiser: those are measured on their own, in turns with the
rest. `waits` is how often our step makes the host wait for the GPU; a CPU has nothing to wait for.
"""

from __future__ import annotations

import argparse
import copy
import functools
import sys
import warnings
from collections.abc import Callable

import measure
import torch
import torch.nn.functional as F
from dynamic_head import plain_masks
from losses import plain_pairwise, random_boxes, smooth_image
from torch import Tensor
from torchvision.ops import FrozenBatchNorm2d

from boxinst import Batch, CondInst, ModelConfig, Targets
from boxinst.condinst import Outputs
from boxinst.config import LossConfig
from boxinst.criterion import Criterion, _MaskSums
from boxinst.dynamic import HeadShape, aligned_upsample, box_masks
from boxinst.fcos import DenseOutputs, Locations
from boxinst.layers import Conv3x3, FixedNorm, Pointwise

INSTANCES = 8
STEP = 10_000
"""After the warm-up of the pairwise loss."""


def plain_controllers(dense: DenseOutputs, n: int) -> Tensor:
    """[L, K] of one image, at all locations."""
    of = dense.controllers
    levels = (level[n : n + 1].to(of.weight.dtype) for level in of.features)
    maps = [F.conv2d(level, of.weight, of.bias, padding=1).flatten(2) for level in levels]
    return torch.cat(maps, 2)[0].T


class PlainCriterion(Criterion):
    """The mask losses of detection as in the published program; all else is inherited."""

    def _detect_mask_sums(
        self,
        features: Tensor,
        dense: DenseOutputs,
        places: Locations,
        n: int,
        targets: Targets,
        instance: Tensor,
        where: Tensor,
        similarity: Tensor,
    ) -> _MaskSums:
        where = where[where >= 0]
        who, stride = instance[where], self.model.loss_stride
        coarse = plain_masks(
            features.float(),
            torch.full_like(where, n),
            plain_controllers(dense, n)[where],
            places.points[where],
            places.sizes[where, None].expand(-1, 2),
            HeadShape.of(self.model),
        )
        logits = aligned_upsample(coarse.float(), 2)
        covered = torch.cat([targets.boxes[:, :2].floor(), targets.boxes[:, 2:]], 1)
        inside = box_masks(covered, (logits.shape[1], logits.shape[2]), stride)[who].float()
        scores = logits.sigmoid()
        projection = logits.new_zeros(())
        for axis in (1, 2):
            shadow, wanted = scores.amax(axis), inside.amax(axis)
            overlap = (shadow * wanted).sum(1)
            projection = projection + (1 - 2 * overlap / ((shadow**2).sum(1) + (wanted**2).sum(1) + 1e-5)).sum()
        copies = torch.cat([similarity[n : n + 1]] * len(where))
        pairwise, edges = plain_pairwise(logits, copies, inside)
        boxes = torch.full_like(edges, len(where))
        none = torch.zeros_like(edges)
        return _MaskSums(projection, none, pairwise, edges, boxes, none, *[none] * 5)


class Case:
    """A network and a batch."""

    def __init__(self, size: tuple[int, int], count: int, args: argparse.Namespace) -> None:
        torch.manual_seed(0)
        height, width = size
        classes = tuple(f"class {k}" for k in range(80))
        config = ModelConfig(classes=classes, prompt=False, frozen_norm=True, frozen_stages=2)
        self.device, self.amp = args.device, args.amp
        plain = CondInst(config).to(args.device).train()
        ours = copy.deepcopy(plain).to(memory_format=torch.channels_last)
        for module in plain.modules():
            if isinstance(module, FixedNorm):
                module.__class__ = FrozenBatchNorm2d
            elif isinstance(module, Pointwise | Conv3x3):
                module.__class__ = torch.nn.Conv2d
        laid_out = copy.deepcopy(plain).to(memory_format=torch.channels_last)
        # The network lays its images out itself, channels last.
        plain.backbone.register_forward_pre_hook(lambda _, inputs: inputs[0].contiguous())
        models = {"plain": plain, "laid out": laid_out, "ours": ours}
        # Whoever compiles our step would compile theirs no less: all three go through it.
        self.networks = {name: torch.compile(m) if args.compile else m for name, m in models.items()}
        self.optimizers = {
            name: torch.optim.SGD(
                [p for p in m.parameters() if p.requires_grad], lr=0.0, momentum=0.9, fused=name != "plain" or None
            )
            for name, m in models.items()
        }
        g = torch.Generator().manual_seed(0)
        images = torch.stack([smooth_image(height, width, g) for _ in range(count)])
        labels = torch.randint(0, 80, (count, INSTANCES), generator=g)
        targets = [Targets(random_boxes(INSTANCES, height, width, g), labels[n]) for n in range(count)]
        valid = torch.ones(count, height, width, dtype=torch.bool)
        self.batch = Batch(images, valid, targets, list(range(count))).to(args.device)
        kinds = {"plain": PlainCriterion, "laid out": PlainCriterion, "ours": Criterion}
        self.criteria = {name: kind(config, LossConfig()) for name, kind in kinds.items()}

    def forward(self, name: str) -> Outputs:
        """One pass of a network."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.amp):
            return self.networks[name](self.batch.images, None, self.batch.sizes)

    def step(self, name: str) -> Tensor:
        """A whole step; returns the loss."""
        loss = self.criteria[name](self.forward(name), self.batch, STEP)["loss"]
        self._learn(name, loss.backward)
        return loss.detach()

    def network_alone(self) -> None:
        """A step of ours with given gradients in the place of a loss."""
        outputs = self.forward("ours")
        dense = outputs.dense
        assert dense is not None
        given = [outputs.mask_features, dense.class_logits, dense.distances, dense.centerness]
        self._learn("ours", lambda: torch.autograd.backward(given, [torch.zeros_like(x) for x in given]))

    def _learn(self, name: str, backward: Callable[[], None]) -> None:
        self.optimizers[name].zero_grad(set_to_none=True)
        backward()
        self.optimizers[name].step()

    def waits(self) -> str:
        """How often a step of ours makes the host wait for the GPU."""
        if self.device.type != "cuda":
            return "-"
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            self.step("ours")
        torch.cuda.set_sync_debug_mode("default")
        return str(sum("synchroniz" in str(warning.message) for warning in found))


def row(size: tuple[int, int], count: int, args: argparse.Namespace) -> list[str]:
    """One line of the table."""
    case = Case(size, count, args)
    losses = {name: float(case.step(name)) for name in case.criteria}
    ways: dict[str, Callable[[], object]] = {name: functools.partial(case.step, name) for name in case.criteria}
    ways["network"] = case.network_alone
    time = measure.seconds(ways, args.repeats, args.device)
    memory = {}
    for name in ("plain", "ours"):
        for optimizer in case.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        memory[name] = measure.peak_allocated(ways[name], args.device)
    return [
        f"{size[0]}×{size[1]}",
        *(str(count), *(f"{time[name]:.2f}" for name in case.criteria)),
        *(f"{time[name] / time['ours']:.2f}" for name in ("plain", "laid out")),
        *(f"{count / time['ours']:.2f}", f"{1 - time['network'] / time['ours']:.0%}"),
        *(f"{memory['plain']:.0f}", f"{memory['ours']:.0f}"),
        *(f"{max(abs(loss / losses['ours'] - 1) for loss in losses.values()):.0e}", case.waits()),
    ]


def main() -> int:
    """Measure and print the table."""
    parser = measure.arguments(__doc__, repeats=3)
    parser.add_argument(
        "--sizes",
        nargs="+",
        default=[(256, 320), (800, 1216)],
        type=lambda text: tuple(int(side) for side in text.split("x")),
        help="HEIGHTxWIDTH in pixels, multiples of 32 (default: 256x320 800x1216)",
    )
    parser.add_argument("--batches", nargs="+", type=int, default=[1], help="images in a step (default: 1)")
    parser.add_argument("--amp", action="store_true", help="the network in bf16")
    parser.add_argument("--compile", action="store_true", help="the network through torch.compile")
    args = measure.parse(parser)
    header = [
        "pixels",
        "images",
        "plain s",
        "laid out s",
        "ours s",
        "plain / ours",
        "laid out / ours",
        "images/s",
        "loss",
        "plain MiB",
        "ours MiB",
        "Δ",
        "waits",
    ]
    rows = [row(size, count, args) for size in args.sizes for count in args.batches]
    about = f"{args.threads} thread(s), {args.device}" + ", bf16" * args.amp + ", compiled" * args.compile
    print(f"Training step of the published network, ResNet-50, {INSTANCES} boxes per image, {about}\n")
    print(measure.table(header, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
