"""The losses of FCOS, CondInst and BoxInst, each beside its equation; pure functions of tensors.

Shape letters: N images, P instances, K = kernel_size² − 1 neighbours of a pixel, H and W cells of the grid the
losses work on, n locations or boxes. Neighbours are in row-major order without the centre.

Half-precision inputs are raised to float32 here, under autocast as well. A loss that comes as ``*_terms`` gives
its parts, so that instances held in windows of several sizes can be summed before the division. With no
instance every loss is 0 and still differentiable.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torchvision.ops import sigmoid_focal_loss

from boxinst.contrast import local_contrast

DICE_EPS = 1e-5

# sRGB to XYZ (D65) and the white point of the 2° observer: the constants of skimage.color.rgb2lab.
_XYZ_FROM_RGB = (
    (0.412453, 0.357580, 0.180423),
    (0.212671, 0.715160, 0.072169),
    (0.019334, 0.119193, 0.950227),
)
_WHITE = (0.95047, 1.0, 1.08883)

# Cells handled at a time by the pairwise loss: on a CPU its temporaries then stay in the cache.
_CHUNK_CPU = 1 << 16
_CHUNK_GPU = 1 << 22
# The calls for one part alone take as long as some 10,000 cells: smaller maps are not cut to the box.
_CELLS_OF_A_SMALL_MAP = 1 << 14


# ------------------------------------------------------------------------------------------------ detection (FCOS)


def focal_loss(logits: Tensor, targets: Tensor, *, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Sum of −α_t (1 − p_t)^γ log p_t over all entries (focal loss, arXiv 1708.02002, eq. 5).

    Args:
        logits: [n, C].
        targets: [n, C], 0 or 1; an all-zero row is background.
        alpha: weight of the positives; the negatives have 1 − alpha.
        gamma: exponent that plays down the easy entries.

    Returns:
        A scalar; divide it by the number of positives.
    """
    logits = _full(logits)
    loss: Tensor = sigmoid_focal_loss(logits, targets.to(logits.dtype), alpha=alpha, gamma=gamma, reduction="sum")
    return loss


def giou_loss(distances: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Weighted sum of 1 − GIoU (arXiv 1902.09630) of boxes given by their distances from a shared location.

    The IoU's numerator and denominator each carry + 1, as in the published FCOS, so that equal training needs
    distances in the published unit: the stride of the level.

    Args:
        distances: [n, 4] predicted distances to the left, top, right and bottom side, none negative.
        targets: [n, 4] true distances, positive.
        weights: [n], the centre-ness of the location; 1 each when None.

    Returns:
        A scalar; divide it by the sum of the weights.
    """
    distances = _full(distances)
    targets = targets.to(distances.dtype)
    area = (distances[:, 0] + distances[:, 2]) * (distances[:, 1] + distances[:, 3])
    target_area = (targets[:, 0] + targets[:, 2]) * (targets[:, 1] + targets[:, 3])
    near, far = torch.minimum(distances, targets), torch.maximum(distances, targets)
    intersection = (near[:, 0] + near[:, 2]) * (near[:, 1] + near[:, 3])
    hull = (far[:, 0] + far[:, 2]) * (far[:, 1] + far[:, 3])
    union = area + target_area - intersection
    loss = 1 - (intersection + 1) / (union + 1) + (hull - union) / hull
    return loss.sum() if weights is None else (loss * weights).sum()


def centerness_loss(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Weighted sum of the binary cross-entropy of the centre-ness (FCOS, arXiv 1904.01355, eq. 3).

    Args:
        logits: [n].
        targets: [n], sqrt(min(l, r) / max(l, r) · min(t, b) / max(t, b)), in 0..1.
        weights: [n], 1 at positive locations and 0 elsewhere; 1 each when None.
    """
    logits = _full(logits)
    return F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), weights, reduction="sum")


# ------------------------------------------------------------------------------------------------ masks


def dice_terms(mask_logits: Tensor, masks: Tensor) -> Tensor:
    """Dice loss of each mask, 1 − 2 Σ p g / (Σ p² + Σ g² + ε) (V-Net, arXiv 1606.04797).

    Args:
        mask_logits: [P, H, W].
        masks: [P, H, W], 0 or 1.

    Returns:
        [P].
    """
    probabilities = _full(mask_logits).sigmoid()
    return _dice(probabilities.flatten(1), masks.to(probabilities.dtype).flatten(1))


def dice_loss(mask_logits: Tensor, masks: Tensor) -> Tensor:
    """Mean of ``dice_terms`` over the instances: the loss of an instance that has a mask label."""
    return _mean(dice_terms(mask_logits, masks))


def projection_terms(mask_logits: Tensor, box_masks: Tensor) -> Tensor:
    """Projection loss of each instance (BoxInst, arXiv 2012.02310, eq. 2 and 3).

    The dice loss between the projection of the mask, its maximum along an axis, and that of the box, summed
    over both axes.

    Args:
        mask_logits: [P, H, W].
        box_masks: [P, H, W], 1 inside the box and 0 outside.

    Returns:
        [P].
    """
    mask_logits = _full(mask_logits)
    loss = mask_logits.new_zeros(len(mask_logits))
    for axis in (1, 2):
        # The maximum of the logits is where the maximum of the probabilities is, and there are fewer to squash.
        projection = mask_logits.max(dim=axis).values.sigmoid()
        loss = loss + _dice(projection, box_masks.amax(dim=axis).to(projection.dtype))
    return loss


def projection_loss(mask_logits: Tensor, box_masks: Tensor) -> Tensor:
    """Mean of ``projection_terms`` over the instances."""
    return _mean(projection_terms(mask_logits, box_masks))


def _dice(probabilities: Tensor, targets: Tensor) -> Tensor:
    """[P, m], [P, m] -> [P]."""
    overlap = (probabilities * targets).sum(1)
    return 1 - 2 * overlap / (probabilities.square().sum(1) + targets.square().sum(1) + DICE_EPS)


# ------------------------------------------------------------------------------------------------ colour affinity


@torch.no_grad()
def color_similarity(
    images: Tensor,
    valid: Tensor | None = None,
    *,
    stride: int = 4,
    kernel_size: int = 3,
    dilation: int = 2,
    theta: float = 2.0,
    contrast_reach: int = 0,
) -> Tensor:
    """Colour similarity of each cell and its neighbours, exp(−‖c_i − c_j‖ / θ) in CIE-LAB (BoxInst, eq. 6).

    Colours are those of the image reduced by averaging stride × stride pixels and cut to 8 bits.

    With a ``contrast_reach`` of r the distances of cell i are divided by their mean over the (2r + 1)² cells around it.
    One θ then means the same in a grainy image, where neighbours of one object differ much, and in a faint one, where
    even an outline is a small difference.

    Args:
        images: [N, 3, H, W] RGB in 0..255, uint8 or float.
        valid: [N, H, W] bool, False on padding; all True when None. A cell is valid when the pixel at its
            centre is, and only the neighbour's validity counts.
        stride: pixels per cell, along each axis.
        kernel_size: side of the neighbourhood, odd.
        dilation: distance in cells between neighbours.
        theta: θ, in units of ΔE, or of the local mean distance where ``contrast_reach`` is given.
        contrast_reach: r in cells, about the size of an object; 0 for distances as they are.

    Returns:
        [N, K, H // stride, W // stride] float32, 0 where the neighbour is invalid or outside the image.
    """
    colors = images.float()
    if stride > 1:
        colors = F.avg_pool2d(colors, stride)
    lab = _lab_from_rgb(colors.clamp(0, 255).long())  # [N, 3, h, w]
    n, _, h, w = lab.shape
    if valid is None:
        neighbour_valid = torch.ones(n, h, w, dtype=torch.bool, device=images.device)
    else:
        neighbour_valid = valid[:, stride // 2 :: stride, stride // 2 :: stride][:, :h, :w]

    reach = kernel_size // 2 * dilation
    around = (reach, reach, reach, reach)
    lab_padded, valid_padded = F.pad(lab, around), F.pad(neighbour_valid, around)
    distances = lab.new_empty(n, kernel_size**2 - 1, h, w)
    neighbours_valid = torch.empty_like(distances, dtype=torch.bool)
    for k, (dy, dx) in enumerate(neighbours(kernel_size, dilation)):
        rows, columns = slice(reach + dy, reach + dy + h), slice(reach + dx, reach + dx + w)
        distances[:, k] = (lab - lab_padded[:, :, rows, columns]).square().sum(1).sqrt()
        neighbours_valid[:, k] = valid_padded[:, rows, columns]
    unit: Tensor | float = theta
    if contrast_reach:
        unit = theta * local_contrast(distances, neighbours_valid & neighbour_valid[:, None], contrast_reach)
    return (-distances / unit).exp_().mul_(neighbours_valid)


def _lab_from_rgb(rgb: Tensor) -> Tensor:
    """sRGB [N, 3, h, w] int64 in 0..255 -> CIE-LAB (D65, 2°) [N, 3, h, w] float32."""
    levels = torch.arange(256, dtype=torch.float64, device=rgb.device) / 255
    linear = torch.where(levels > 0.04045, ((levels + 0.055) / 1.055) ** 2.4, levels / 12.92)
    red, green, blue = linear.float()[rgb].unbind(1)
    f = []
    # Plain sums of products: a GPU may compute a matrix product in reduced precision.
    for (r, g, b), white in zip(_XYZ_FROM_RGB, _WHITE, strict=True):
        t = red * (r / white) + green * (g / white) + blue * (b / white)
        f.append(torch.where(t > 0.008856, t.clamp(min=0.008856) ** (1 / 3), 7.787 * t + 16 / 116))
    x, y, z = f
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)


def pairwise_loss(
    mask_logits: Tensor,
    similarity: Tensor,
    box_masks: Tensor,
    *,
    image_index: Tensor | None = None,
    threshold: float = 0.3,
    kernel_size: int = 3,
    dilation: int = 2,
) -> Tensor:
    """Mean of −log P(same label) over the pairs of alike colour (BoxInst, eq. 5 and 7).

    A pair is a pixel i inside the box with its neighbour k, where similarity[k, i] ≥ threshold; so an edge with
    both ends inside counts twice, and where the similarity is not symmetric each end counts by its own entry.

    Args:
        mask_logits: [P, H, W].
        similarity: [N, K, H, W] from ``color_similarity`` with the same kernel size and dilation.
        box_masks: [P, H, W], 1 inside the box and 0 outside.
        image_index: [P] int64, the image of each instance; None where N = P and each has its own.
        threshold: τ.
        kernel_size: side of the neighbourhood, odd.
        dilation: distance in cells between neighbours.
    """
    total, count = pairwise_terms(
        mask_logits,
        similarity,
        box_masks,
        image_index=image_index,
        threshold=threshold,
        kernel_size=kernel_size,
        dilation=dilation,
    )
    return total / count.clamp(min=1)


def pairwise_terms(
    mask_logits: Tensor,
    similarity: Tensor,
    box_masks: Tensor,
    *,
    image_index: Tensor | None = None,
    corners: Tensor | None = None,
    threshold: float = 0.3,
    kernel_size: int = 3,
    dilation: int = 2,
) -> tuple[Tensor, Tensor]:
    """The sum over the pairs of ``pairwise_loss``, and their number.

    Instances may be windows of the grid: then ``corners`` says where they lie, and mask_logits and box_masks are
    [P, h, w]. To be exact a window must hold the box and a margin of kernel_size // 2 · dilation cells around
    it; it may reach beyond the grid.

    Args:
        mask_logits: [P, H, W], or [P, h, w] windows.
        similarity: [N, K, H, W].
        box_masks: as mask_logits, 1 inside the box and 0 outside.
        image_index: [P] int64; None where N = P.
        corners: [P, 2] int64, row and column in the grid of each window's first cell; None for the whole grid.
        threshold, kernel_size, dilation: as in ``pairwise_loss``.

    Returns:
        (sum, number of pairs), scalars; the number has no gradient.
    """
    with torch.no_grad():
        alike = similarity >= threshold  # [N, K, H, W]
        # One integer per cell holds its K answers: the instances of an image read it at a byte each.
        bits = torch.zeros_like(alike[:, 0], dtype=torch.uint8 if alike.shape[1] <= 8 else torch.int64)
        for k in range(alike.shape[1]):
            bits |= alike[:, k].to(bits.dtype) << k
        bits &= _bits_within(bits.shape[1], bits.shape[2], kernel_size, dilation, bits)
        degree = alike.sum(1, dtype=torch.uint8)
        inside = box_masks.bool()
        if image_index is None:
            image_index = torch.arange(len(mask_logits), device=mask_logits.device)
        if corners is not None:
            cells, in_grid = window_cells(corners, image_index, bits.shape, mask_logits.shape)
            inside = inside & in_grid
            bits, degree = (x.flatten().index_select(0, cells.flatten()).view_as(inside) for x in (bits, degree))
            bits &= _bits_within(bits.shape[1], bits.shape[2], kernel_size, dilation, bits)
            image_index = torch.arange(len(mask_logits), device=mask_logits.device)  # each has its own cells now
        crops = _crops(inside, kernel_size // 2 * dilation)
        pairs, count = [], torch.zeros((), dtype=torch.int64, device=mask_logits.device)
        for who, rows, columns in crops:
            of, within = image_index[who], inside[who, rows, columns]
            pairs.append(bits[:, rows, columns].index_select(0, of) * within)
            count += (degree[:, rows, columns].index_select(0, of) * within).sum()
    total = _PairwiseSum.apply(mask_logits, crops, pairs, neighbours(kernel_size, dilation))
    return total, count.to(total.dtype)


Crop = tuple[slice, slice, slice]
"""Instances, rows and columns: a part of [P, H, W]."""


def _crops(inside: Tensor, margin: int) -> list[Crop]:
    """Parts of [P, H, W] that together hold every True cell and, within the grid, ``margin`` cells around it.

    On a CPU every instance is cut to its extent, so that the cost follows the area of the boxes; but small maps stay
    whole, several at a time, since each part has its own costs. On a GPU one would have to wait for the extents.
    """
    count, h, w = inside.shape
    on_cpu = inside.device.type == "cpu"
    if h * w <= _CELLS_OF_A_SMALL_MAP or not on_cpu:
        step = max(1, (_CHUNK_CPU if on_cpu else _CHUNK_GPU) // max(h * w, 1))
        return [(slice(first, first + step), slice(0, h), slice(0, w)) for first in range(0, count, step)]
    spans = []
    for axis, length in ((2, h), (1, w)):
        taken = inside.view(torch.uint8).amax(axis)  # [P, length]; bytes are quicker to reduce than bool
        first, after = taken.argmax(1), length - taken.flip(1).argmax(1)
        spans.append(torch.stack([(first - margin).clamp(min=0), after + margin], 1).tolist())
    filled = inside.flatten(1).any(1).tolist()
    return [
        (slice(p, p + 1), slice(*rows), slice(*columns))
        for p, (rows, columns) in enumerate(zip(*spans, strict=True))
        if filled[p]
    ]


class _PairwiseSum(torch.autograd.Function):
    """Σ over pairs of −log P(same) = softplus(a) + softplus(b) − softplus(a + b), with logits a and b of the ends.

    As the term of an edge is symmetric, half of the neighbours suffice: an edge (i, j) weighs
    w_ij = [i has the pair] + [j has the pair], and with W_i = Σ_j w_ij the sum is

        Σ_i W_i softplus(a_i) − Σ_(i,j) w_ij softplus(a_i + a_j),
        its gradient to a_i is W_i σ(a_i) − Σ_j w_ij σ(a_i + a_j).

    Both come out of one pass, so that nothing but the gradient within the crops is kept for the way back.
    """

    @staticmethod
    def forward(
        ctx: Any, mask_logits: Tensor, crops: list[Crop], pairs: list[Tensor], offsets: list[tuple[int, int]]
    ) -> Tensor:
        """The sum over ``crops`` of mask_logits [P, H, W]; no cell outside them has a pair.

        pairs: [m, h, w] for each crop: bit k is set where the cell has the pair with its neighbour k, at offsets[k],
        which then lies in the crop too.
        """
        dtype = torch.float64 if mask_logits.dtype == torch.float64 else torch.float32
        sums = [_crop_sum(mask_logits[c].to(dtype), p, offsets) for c, p in zip(crops, pairs, strict=True)]
        ctx.save_for_backward(*(gradient for _, gradient in sums))
        ctx.crops, ctx.shape, ctx.dtype = crops, mask_logits.shape, mask_logits.dtype
        zero = torch.zeros((), dtype=torch.float64, device=mask_logits.device)
        return sum((value for value, _ in sums), zero).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        gradient = grad_output.new_zeros(ctx.shape, dtype=ctx.dtype)
        for crop, part in zip(ctx.crops, ctx.saved_tensors, strict=True):
            gradient[crop] = part * grad_output
        return gradient, None, None, None


def _crop_sum(logits: Tensor, pairs: Tensor, offsets: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """The sum of ``_PairwiseSum`` over logits [m, h, w], in double precision, and its gradient [m, h, w]."""
    _, h, w = logits.shape
    a, has_pair = logits.flatten(), pairs.flatten()
    value, weight, pull = torch.zeros_like(a), torch.zeros_like(a), torch.zeros_like(a)
    for k, (dy, dx) in enumerate(offsets):
        if (dy, dx) < (0, 0) or dy >= h or abs(dx) >= w:
            continue  # an edge belongs to its first end in row-major order; so small a grid has none of the others
        # In the flat order a neighbour is a fixed shift away; where the shift leaves the row or the instance the
        # neighbour lies outside the crop, and there the pair's bit is 0.
        shift = dy * w + dx
        i, j = slice(None, -shift), slice(shift, None)
        w_ij = ((has_pair >> k & 1)[i] + (has_pair >> len(offsets) - 1 - k & 1)[j]).to(a.dtype)
        sums = a[i] + a[j]
        value[i].sub_(F.softplus(sums).mul_(w_ij))
        edge_pull = sums.sigmoid_().mul_(w_ij)
        for end in (i, j):
            weight[end].add_(w_ij)
            pull[end].add_(edge_pull)
    value.add_(F.softplus(a).mul_(weight))
    return value.sum(dtype=torch.float64), a.sigmoid().mul_(weight).sub_(pull).view_as(logits)


def window_cells(corners: Tensor, image_index: Tensor, grid: torch.Size, window: torch.Size) -> tuple[Tensor, Tensor]:
    """Where the cells of the windows lie in a flattened [N, H, W] grid, [P, h, w] int64, and whether they do."""
    _, height, width = grid
    rows = corners[:, :1] + torch.arange(window[1], device=corners.device)  # [P, h]
    columns = corners[:, 1:] + torch.arange(window[2], device=corners.device)  # [P, w]
    row_ok, column_ok = (rows >= 0) & (rows < height), (columns >= 0) & (columns < width)
    rows = rows.clamp(0, height - 1) + image_index[:, None] * height
    cells = rows[:, :, None] * width + columns.clamp(0, width - 1)[:, None]
    return cells, row_ok[:, :, None] & column_ok[:, None]


def neighbours(kernel_size: int, dilation: int) -> list[tuple[int, int]]:
    """(dy, dx) of the K neighbours, row-major; neighbour K − 1 − k lies opposite to neighbour k."""
    reach = kernel_size // 2
    steps = [dilation * i for i in range(-reach, reach + 1)]
    return [(dy, dx) for dy in steps for dx in steps if (dy, dx) != (0, 0)]


def _bits_within(h: int, w: int, kernel_size: int, dilation: int, like: Tensor) -> Tensor:
    """[h, w] of like's dtype: bit k is set where neighbour k lies within the grid."""
    within = torch.zeros(h, w, dtype=like.dtype, device=like.device)
    for k, (dy, dx) in enumerate(neighbours(kernel_size, dilation)):
        rows, columns = slice(max(0, -dy), max(0, h - max(0, dy))), slice(max(0, -dx), max(0, w - max(0, dx)))
        within[rows, columns] |= 1 << k
    return within


def warmup(step: int, steps: int) -> float:
    """Weight of the pairwise term: min(step / steps, 1), rising linearly over the first ``steps`` steps.

    Args:
        step: the current step, counted from 1.
        steps: length of the warm-up; 0 for none.
    """
    return 1.0 if steps <= 0 else min(step / steps, 1.0)


def _full(x: Tensor) -> Tensor:
    """Half precision raised to float32; float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _mean(terms: Tensor) -> Tensor:
    """Mean of [P], 0 for P = 0."""
    return terms.sum() / max(len(terms), 1)
