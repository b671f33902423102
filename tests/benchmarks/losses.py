"""Time and memory of the pairwise loss, forward and backward, against the plain formulation.

    python tests/benchmarks/losses.py
    python tests/benchmarks/losses.py --instances 16 --grid 100 152

The first table: boxes of the size of COCO's objects (sides of 5 to 45 % of the image) and boxes that fill the image.
The second: the cost by the side of the boxes. Both ways get the same logits, boxes and colours and must give the same
value and gradient; Δ is the largest difference relative to the largest absolute value.

The plain formulation has log p and log (1 − p) unfolded to the 8 neighbours of each cell, their log-sum-exp, and a
weight for each edge, over whole maps and with autograd. It is given the similarities copied for each instance; to
copy them is not counted.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import measure
import torch
import torch.nn.functional as F
from torch import Tensor

from boxinst.losses import color_similarity, pairwise_loss

THRESHOLD, KERNEL_SIZE, DILATION = 0.3, 3, 2
"""As published."""


def plain_pairwise(mask_logits: Tensor, similarity: Tensor, box_masks: Tensor) -> tuple[Tensor, Tensor]:
    """The sum over the pairs and their number, in the structure of the published program.

    Args:
        mask_logits: [P, H, W].
        similarity: [P, 8, H, W], a copy for each instance.
        box_masks: [P, H, W], 1 inside the box and 0 outside.
    """
    log_foreground, log_background = F.logsigmoid(mask_logits), F.logsigmoid(-mask_logits)
    both_foreground = log_foreground[:, None] + _around(log_foreground)
    both_background = log_background[:, None] + _around(log_background)
    same = torch.logaddexp(both_foreground, both_background)  # [P, 8, H, W]
    weights = (similarity >= THRESHOLD).float() * box_masks[:, None].float()
    return -(same * weights).sum(), weights.sum()


def _around(maps: Tensor) -> Tensor:
    """[P, H, W] → the values at the 8 neighbours of each cell [P, 8, H, W], 0 outside."""
    count, h, w = maps.shape
    unfolded = F.unfold(maps[:, None], KERNEL_SIZE, dilation=DILATION, padding=KERNEL_SIZE // 2 * DILATION)
    cells, centre = unfolded.view(count, KERNEL_SIZE**2, h, w), KERNEL_SIZE**2 // 2
    return torch.cat([cells[:, :centre], cells[:, centre + 1 :]], 1)


def smooth_image(height: int, width: int, generator: torch.Generator) -> Tensor:
    """A picture of soft blobs, uint8 [3, H, W]: neighbours are alike in places and in others they are not."""
    blobs = torch.rand(1, 3, height // 64 + 2, width // 64 + 2, generator=generator) * 255
    return F.interpolate(blobs, (height, width), mode="bicubic").clamp(0, 255).to(torch.uint8)[0]


def random_boxes(
    count: int, height: float, width: float, generator: torch.Generator, shares: tuple[float, float] = (0.05, 0.45)
) -> Tensor:
    """Boxes [P, 4] xyxy inside height × width, whose sides are between these shares of it."""
    size = torch.tensor([width, height])
    sides = (torch.rand(count, 2, generator=generator) * (shares[1] - shares[0]) + shares[0]) * size
    corner = torch.rand(count, 2, generator=generator) * (size - sides)
    return torch.cat([corner, corner + sides], 1)


class Case:
    """Logits, boxes and colours of one row of a table."""

    def __init__(self, instances: int, grid: tuple[int, int], shares: tuple[float, float], device: torch.device):
        h, w = grid
        g = torch.Generator().manual_seed(0)
        boxes = random_boxes(instances, h, w, g, shares).round().long()
        rows, columns = torch.arange(h)[:, None], torch.arange(w)
        x0, y0, x1, y1 = boxes[:, :, None, None].unbind(1)
        inside = (rows >= y0) & (rows < y1) & (columns >= x0) & (columns < x1)
        self.logits = (torch.randn(instances, h, w, generator=g) * 3).to(device).requires_grad_()
        self.box_masks = inside.to(device)
        self.similarity = color_similarity(smooth_image(h * 4, w * 4, g)[None]).to(device)
        self.copies = self.similarity.expand(instances, -1, -1, -1).contiguous()
        self.image_index = torch.zeros(instances, dtype=torch.int64, device=device)

    def _both_ways(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        self.logits.grad = None
        loss.backward()
        assert self.logits.grad is not None
        return loss.detach(), self.logits.grad

    def plain(self) -> tuple[Tensor, Tensor]:
        """Value and gradient."""
        total, count = plain_pairwise(self.logits, self.copies, self.box_masks)
        return self._both_ways(total / count.clamp(min=1))

    def ours(self) -> tuple[Tensor, Tensor]:
        """Value and gradient."""
        loss = pairwise_loss(self.logits, self.similarity, self.box_masks, image_index=self.image_index)
        return self._both_ways(loss)

    def memory(self, way: Callable[[], object]) -> float:
        """MiB, the gradient included."""
        self.logits.grad = None
        return measure.peak_allocated(way, self.logits.device)


def difference(a: Tensor, b: Tensor) -> str:
    """Largest difference relative to the largest absolute value of ``b``."""
    return f"{float((a - b).abs().max() / b.abs().max()):.0e}"


def main() -> int:
    """Measure and print both tables."""
    parser = measure.arguments(__doc__, repeats=5)
    parser.add_argument("--instances", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument(
        "--grid", type=int, nargs=2, default=(200, 304), metavar=("H", "W"), help="cells (default: 200 304)"
    )
    args = measure.parse(parser)
    grid, rows = tuple(args.grid), []
    for name, shares in (("as in COCO", (0.05, 0.45)), ("fill the image", (1.0, 1.0))):
        case = Case(args.instances, grid, shares, args.device)
        (value, gradient), (plain_value, plain_gradient) = case.ours(), case.plain()
        time = measure.seconds({"plain": case.plain, "ours": case.ours}, args.repeats, args.device)
        plain_memory, our_memory = case.memory(case.plain), case.memory(case.ours)
        rows.append(
            [
                name,
                *(f"{time['plain']:.2f}", f"{time['ours']:.3f}", f"{time['plain'] / time['ours']:.0f}"),
                *(f"{plain_memory:.0f}", f"{our_memory:.0f}", f"{plain_memory / our_memory:.0f}"),
                *(difference(value, plain_value), difference(gradient, plain_gradient)),
            ]
        )
    header = ["boxes", "plain s", "ours s", "ratio", "plain MiB", "ours MiB", "ratio", "value Δ", "gradient Δ"]
    about = f"{args.instances} instances on {grid[0]}×{grid[1]} cells, {args.threads} thread(s), {args.device}"
    print(f"Pairwise loss, forward and backward, {about}\n\n{measure.table(header, rows)}\n")
    cases = {side: Case(args.instances, grid, (side, side), args.device) for side in (0.05, 0.1, 0.2, 0.4, 0.8)}
    time = measure.seconds({f"{side:.0%}": case.ours for side, case in cases.items()}, args.repeats, args.device)
    rows = [["ours ms", *(f"{t * 1000:.0f}" for t in time.values())]]
    print(measure.table(["sides of the boxes, of those of the image", *time], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
