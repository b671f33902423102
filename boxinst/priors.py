"""What a mask may look like, beyond the published losses: ours, each off unless asked for.

Boxes alone leave two ways out, a mask that fills its box and one that vanishes; each of these closes one of them.

Shape letters: P instances, N images, H and W cells of the grid the losses work on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from boxinst.colors import cells_valid, root_colors
from boxinst.dynamic import box_masks, box_sides, gather_windows
from boxinst.losses import dice_terms, window_cells
from boxinst.structures import Batch

REGION_MARGIN = 0.25
"""Background around a box that its object's colours are compared with, as a share of the box's longer side: enough for
a mean colour, and not yet another place of the image."""

_LEAST_CELLS = 1e-3
_LEAST_VARIANCE = 1e-3  # summed over cells: without colour there is nothing to explain


def fill_terms(mask_logits: Tensor, box_masks: Tensor, fill_range: tuple[float, float]) -> Tensor:
    """How far each mask fills less or more of its box than it may: max(least − f, 0) + max(f − most, 0).

    f = Σ p b / Σ b. Projection and pairwise loss alone are content with a mask that fills its box, and with one that is
    a thin cross; the shape of most objects allows neither.

    Args:
        mask_logits: [P, H, W].
        box_masks: [P, H, W], 1 inside the box and 0 outside.
        fill_range: (least, most) share.

    Returns:
        [P].
    """
    probabilities = mask_logits.float().sigmoid()
    inside = box_masks.to(probabilities.dtype)
    fill = (probabilities * inside).sum((1, 2)) / inside.sum((1, 2)).clamp(min=1)
    least, most = fill_range
    return (least - fill).clamp(min=0) + (fill - most).clamp(min=0)


def imitation_terms(mask_logits: Tensor, teacher_logits: Tensor, box_masks: Tensor) -> Tensor:
    """Dice loss of each mask against a teacher's, weighted by the teacher's mean probability on its mask.

    Args:
        mask_logits: [P, H, W].
        teacher_logits: [P, H, W], without gradient.
        box_masks: [P, H, W], 1 inside the box and 0 outside; the teacher's masks are cut to it.

    Returns:
        [P]; 0 where the teacher has no mask.
    """
    probabilities = teacher_logits.float().sigmoid() * box_masks
    masks = probabilities > 0.5
    sure = (probabilities * masks).sum((1, 2)) / masks.sum((1, 2)).clamp(min=1)
    return dice_terms(mask_logits, masks) * sure


def region_terms(mask_logits: Tensor, colors: Tensor, weights: Tensor) -> Tensor:
    """Share of the colours' variance that a mask leaves unexplained by a colour of its own and one of the rest.

    E = Σ w (p ‖c − μ₁‖² + (1 − p) ‖c − μ₀‖²) / Σ w ‖c − μ‖², where μ₁, μ₀ and μ are the mean colours of the mask, of
    the rest and of both. It is the energy of two even regions (Chan and Vese, 2001) that BoxLevelset (arXiv 2207.09055)
    and Box2Mask (arXiv 2212.01579) minimise, divided by the variance, so that a faint object counts as much as a bright
    one. Pairwise edges say which neighbours are alike; this says to which side of an outline a whole region belongs.

    Args:
        mask_logits: [P, H, W].
        colors: [P, 3, H, W].
        weights: [P, H, W], 0 for cells that do not count.

    Returns:
        [P], in 0..1; 1 where all colours are equal.
    """
    mask = mask_logits.float().sigmoid().flatten(1)
    weights = weights.to(mask.dtype).flatten(1)
    colors = colors.float().flatten(2)
    mean = (colors * weights[:, None]).sum(2) / weights.sum(1, keepdim=True).clamp(min=_LEAST_CELLS)
    colors = colors - mean[:, :, None]  # also keeps the sums below small: they are differences of squares
    variance = (colors.square().sum(1) * weights).sum(1).clamp(min=_LEAST_VARIANCE)
    explained = torch.zeros_like(variance)
    for region in (mask * weights, (1 - mask) * weights):
        # Σ r ‖c − μ_r‖² = Σ r ‖c‖² − ‖Σ r c‖² / Σ r, and the first parts of both regions make up the variance.
        sums = torch.einsum("pcn,pn->pc", colors, region)
        explained = explained + sums.square().sum(1) / region.sum(1).clamp(min=_LEAST_CELLS)
    return 1 - explained / variance


class Surroundings:
    """Colours in and around the boxes of a batch, and where an object's neighbours may be: for ``region_terms``."""

    def __init__(self, batch: Batch, stride: int) -> None:
        colors, self.stride = root_colors(batch.images, stride), stride
        boxes_here = []
        for targets in batch.host:
            rows, columns = box_sides(targets.boxes, (colors.shape[2], colors.shape[3]), stride)
            boxes_here.append(rows.float().T @ columns.float())
        count = torch.stack(boxes_here).to(colors.device, non_blocking=True)
        self._planes = torch.cat([colors, count[:, None], cells_valid(batch.valid, stride)[:, None]], 1)

    def of(self, boxes: Tensor, windows: Tensor, image_index: Tensor, origins: Tensor) -> tuple[Tensor, Tensor]:
        """What ``region_terms`` needs of boxes in windows: colours [P, 3, h, w], and weights [P, h, w].

        A cell counts in the box grown by ``REGION_MARGIN``, unless another box holds it, as either object may have it.

        Args:
            boxes: [P, 4] xyxy pixels.
            windows: [P, h, w] the boxes in their windows.
            image_index: [P].
            origins: [P, 2] (column, row) of each window's first cell.
        """
        size = (windows.shape[1], windows.shape[2])
        cut = gather_windows(self._planes, image_index, origins, size)
        margin = (boxes[:, 2:] - boxes[:, :2]).amax(1, keepdim=True) * REGION_MARGIN
        grown = torch.cat([boxes[:, :2] - margin, boxes[:, 2:] + margin], 1)
        near = box_masks(grown, size, self.stride, origins)
        alone = cut[:, 3] <= windows
        return cut[:, :3], near & alone & cut[:, 4].bool()


class Owners:
    """What masks claim of cells that another mask of the image claims more: a cell has one owner.

    Only the weaker claims learn from it. A product of the claims would push all of them down, and masks would vanish.
    """

    def __init__(self, similarity: Tensor) -> None:
        n, _, h, w = similarity.shape
        self.grid, self.device = torch.Size((n, h, w)), similarity.device
        self._cells: list[Tensor] = []
        self._claims: list[Tensor] = []
        self._held: list[Tensor] = []

    def add(self, logits: Tensor, windows: Tensor, image_index: Tensor, corners: Tensor) -> None:
        """Claims of instances in windows [P, h, w] whose first cells are ``corners`` (row, column) of the grid."""
        cells, inside = window_cells(corners, image_index, self.grid, logits.shape)
        held = windows & inside
        self._cells.append(cells.flatten())
        self._claims.append((logits.sigmoid() * held).flatten())
        self._held.append(held.flatten())

    def losers(self) -> tuple[Tensor, Tensor]:
        """The sum of all probabilities but the best of each cell, and the number of cells that several boxes hold."""
        if not self._cells:
            zero = torch.zeros((), device=self.device)
            return zero, zero
        cells, claims = torch.cat(self._cells), torch.cat(self._claims)
        empty = claims.new_zeros(self.grid.numel())
        best = empty.scatter_reduce(0, cells, claims.detach(), "amax").index_select(0, cells)
        boxes = empty.index_add(0, cells, torch.cat(self._held).to(claims.dtype))
        return (claims * (claims < best)).sum(), (boxes > 1).sum().to(claims.dtype)
