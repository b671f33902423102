"""What a mask may look like, beyond the published losses: ours, each off unless asked for.

Boxes alone leave two ways out, a mask that fills its box and one that vanishes; each of these closes one of them.

Shape letters: P instances, N images, H and W cells of the grid the losses work on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from boxinst.losses import dice_terms, window_cells


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
