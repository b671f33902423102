"""From the probabilities of a box's pixels to its mask: which pixels it has, and how far it can be trusted.

Shape letters: m instances, each in a window of the image of rows × columns pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from boxinst.losses import neighbours

CERTAIN, DOUBTFUL = 0.5, 0.1
"""Bounds on the probability from which on a pixel belongs to the mask of a given box."""


def reaching(probability: Tensor, inside: Tensor) -> Tensor:
    """The least probability of a mask's pixels with which it touches all four sides of its box, between bounds.

    A box is drawn around its object, so a mask that stays away from a side has lost the part that reached there. The
    projection loss says so in training (arXiv 2012.02310, eq. 2); this says it of the mask that is kept. A mask that
    reaches its box anyway has the pixels from ``CERTAIN`` on. At the other end a box that is drawn too large must not
    blow its mask up, so that it stops at ``DOUBTFUL``; and an object of which the network is unsure in all of its box
    has the pixels from half its highest probability on: a small mask with a low score rather than none.

    Args:
        probability: [m, rows, columns], 0 outside the boxes.
        inside: [m, rows, columns] bool, the pixels of each box.

    Returns:
        [m].
    """
    sides = []
    for axis in (1, 2):
        lines = inside.any(3 - axis).byte()  # [m, n], the rows or columns of the box
        best = probability.amax(3 - axis)
        for end in (lines.argmax(1), lines.shape[1] - 1 - lines.flip(1).argmax(1)):
            sides.append(best.gather(1, end[:, None])[:, 0])
    least = torch.stack(sides).amin(0).clamp(DOUBTFUL, CERTAIN)
    return torch.minimum(least, probability.amax((1, 2)) / 2)


def promised_iou(probability: Tensor, masks: Tensor) -> Tensor:
    """IoU of each mask with its object, if every pixel belonged to the object with its probability.

    Args:
        probability: [m, rows, columns], 0 outside the boxes.
        masks: [m, rows, columns] bool.

    Returns:
        [m] in 0..1; 0 where there is no mask.
    """
    overlap = (probability * masks).sum((1, 2))
    union = masks.sum((1, 2)) + probability.sum((1, 2)) - overlap
    return overlap / union.clamp(min=1e-12)


def outline_contrast(
    masks: Tensor, similarity: Tensor, origins: Tensor, size: tuple[int, int], *, dilation: int = 2
) -> Tensor:
    """How much the colour changes across the outline of each mask: the mean of 1 − similarity over the pairs of a mask
    pixel and a neighbour outside the mask.

    It needs no label and judges a mask by what taught it: BoxInst's colour edges (arXiv 2012.02310, eq. 6) end where
    objects do. A probability alone saturates in long training and then hardly tells good masks from bad ones.

    Args:
        masks: [m, rows, columns] bool, windows of the image.
        similarity: [8, H, W] of the image, padded or not, as ``losses.color_similarity`` gives it at stride 1.
        origins: [m, 2] (x, y) of the first pixel of each window; all windows lie inside H × W.
        size: (height, width) of the image without padding; neighbours outside it do not count.
        dilation: of the similarity.

    Returns:
        [m] in 0..1; 1 where a mask has no neighbour in the image.
    """
    rows, columns = masks.shape[1:]
    y = origins[:, 1, None] + torch.arange(rows, device=masks.device)  # [m, rows]
    x = origins[:, 0, None] + torch.arange(columns, device=masks.device)  # [m, columns]
    change, pairs = similarity.new_zeros(len(masks)), similarity.new_zeros(len(masks))
    # Slices are copied row by row, many times as fast as cells are picked by their index.
    windows = torch.stack([similarity[:, top : top + rows, left : left + columns] for left, top in origins.tolist()])
    around = F.pad(masks, [dilation] * 4)
    for k, (dy, dx) in enumerate(neighbours(3, dilation)):
        beside = around[:, dilation + dy : dilation + dy + rows, dilation + dx : dilation + dx + columns]
        below = (y + dy >= 0) & (y + dy < size[0])
        right = (x + dx >= 0) & (x + dx < size[1])
        edge = masks & ~beside & below[:, :, None] & right[:, None, :]
        change += ((1 - windows[:, k]) * edge).sum((1, 2))
        pairs += edge.sum((1, 2))
    return torch.where(pairs > 0, change / pairs.clamp(min=1), 1.0)
