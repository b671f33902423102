"""The losses against slow references written straight from the equations, in double precision."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from boxinst import losses
from boxinst.contrast import LEAST_CONTRAST

# ------------------------------------------------------------------------------------------------ references


def offsets(kernel_size: int, dilation: int) -> list[tuple[int, int]]:
    reach = kernel_size // 2
    found = []
    for dy in range(-reach, reach + 1):
        for dx in range(-reach, reach + 1):
            if dy or dx:
                found.append((dy * dilation, dx * dilation))
    return found


def reference_lab(rgb: list[float]) -> list[float]:
    """CIE 15 for a pixel in 0..255, with the rounded constants everybody uses."""
    linear = []
    for value in rgb:
        v = value / 255
        linear.append(((v + 0.055) / 1.055) ** 2.4 if v > 0.04045 else v / 12.92)
    r, g, b = linear
    xyz = [
        0.412453 * r + 0.357580 * g + 0.180423 * b,
        0.212671 * r + 0.715160 * g + 0.072169 * b,
        0.019334 * r + 0.119193 * g + 0.950227 * b,
    ]
    f = []
    for value, white in zip(xyz, (0.95047, 1.0, 1.08883), strict=True):
        t = value / white
        f.append(t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116)
    return [116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])]


def reference_similarity(image: Tensor, valid: Tensor, stride: int, kernel_size: int, dilation: int, theta: float):
    """[3, H, W], [H, W] -> [K, H // stride, W // stride] by loops."""
    h, w = image.shape[1] // stride, image.shape[2] // stride
    color, ok = {}, {}
    for y in range(h):
        for x in range(w):
            block = image[:, y * stride : (y + 1) * stride, x * stride : (x + 1) * stride].double()
            color[y, x] = reference_lab([math.floor(c) for c in block.mean((1, 2)).tolist()])
            ok[y, x] = bool(valid[y * stride + stride // 2, x * stride + stride // 2])
    out = torch.zeros(kernel_size**2 - 1, h, w, dtype=torch.float64)
    for k, (dy, dx) in enumerate(offsets(kernel_size, dilation)):
        for (y, x), c in color.items():
            neighbour = (y + dy, x + dx)
            if ok.get(neighbour, False):
                out[k, y, x] = math.exp(-math.dist(c, color[neighbour]) / theta)
    return out


def reference_pairs(logits, similarity, boxes, image_index, threshold, kernel_size, dilation) -> list[Tensor]:
    """−log P(same) of every pair, eq. 5: P(same) = p_i p_j + (1 − p_i)(1 − p_j)."""
    count, h, w = logits.shape
    p = logits.sigmoid()
    terms = []
    for n in range(count):
        for y in range(h):
            for x in range(w):
                for k, (dy, dx) in enumerate(offsets(kernel_size, dilation)):
                    if not boxes[n, y, x] or similarity[image_index[n], k, y, x] < threshold:
                        continue
                    i, j = p[n, y, x], p[n, y + dy, x + dx]
                    terms.append(-torch.log(i * j + (1 - i) * (1 - j)))
    return terms


def reference_pairwise(*args) -> Tensor:
    terms = reference_pairs(*args)
    return torch.stack(terms).sum() / len(terms) if terms else args[0].sum() * 0


def reference_projection(logits: Tensor, boxes: Tensor) -> Tensor:
    """Eq. 2 and 3, instance by instance."""
    losses_ = []
    for p, b in zip(logits.sigmoid(), boxes.double(), strict=True):
        for axis in (0, 1):
            x, t = p.max(dim=axis)[0], b.max(dim=axis)[0]
            losses_.append(1 - 2 * (x * t).sum() / ((x**2).sum() + (t**2).sum() + 1e-5))
    return torch.stack(losses_).sum() / len(logits)


# ------------------------------------------------------------------------------------------------ inputs


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_boxes(count: int, h: int, w: int, seed: int = 0) -> Tensor:
    rng = generator(seed)
    boxes = torch.zeros(count, h, w, dtype=torch.bool)
    for n in range(count):
        y = torch.randint(0, h - 1, (2,), generator=rng).sort().values
        x = torch.randint(0, w - 1, (2,), generator=rng).sort().values
        boxes[n, y[0] : y[1] + 2, x[0] : x[1] + 2] = True
    return boxes


def random_similarity(count: int, h: int, w: int, kernel_size: int = 3, dilation: int = 2, seed: int = 0) -> Tensor:
    """Not symmetric, and 0 for neighbours outside, as ``color_similarity`` makes it."""
    similarity = torch.rand(count, kernel_size**2 - 1, h, w, generator=generator(seed))
    for k, (dy, dx) in enumerate(offsets(kernel_size, dilation)):
        for y in range(h):
            for x in range(w):
                if not (0 <= y + dy < h and 0 <= x + dx < w):
                    similarity[:, k, y, x] = 0
    return similarity


# ------------------------------------------------------------------------------------------------ colour similarity


@pytest.mark.parametrize(
    ("stride", "kernel_size", "dilation", "theta"), [(4, 3, 2, 2.0), (1, 3, 1, 2.0), (2, 5, 2, 10.0), (3, 3, 1, 0.5)]
)
def test_color_similarity_equals_the_reference(stride: int, kernel_size: int, dilation: int, theta: float) -> None:
    h, w = 6 * stride + stride // 2, 5 * stride
    # Smooth, so that the similarities are not all near 0; two images, of which one is partly invalid.
    base = torch.randint(0, 250, (2, 3, 1, 1), generator=generator())
    images = (base + torch.randint(0, 6, (2, 3, h, w), generator=generator(1))).to(torch.uint8)
    valid = torch.ones(2, h, w, dtype=torch.bool)
    valid[1, 3 * stride :] = False
    valid[1, :, -stride:] = False
    got = losses.color_similarity(images, valid, stride=stride, kernel_size=kernel_size, dilation=dilation, theta=theta)
    assert got.dtype == torch.float32
    for n in range(2):
        expected = reference_similarity(images[n], valid[n], stride, kernel_size, dilation, theta)
        assert (expected > 0.05).any()
        torch.testing.assert_close(got[n].double(), expected, rtol=1e-4, atol=1e-5)


def test_relative_similarity_equals_the_reference() -> None:
    h, w, reach, theta = 11, 9, 2, 0.8
    images = torch.randint(0, 256, (2, 3, h, w), generator=generator(), dtype=torch.uint8)
    images[0, :, :6, :5] = 7  # flat: the least contrast counts
    valid = torch.ones(2, h, w, dtype=torch.bool)
    valid[1, 7:] = False
    got = losses.color_similarity(images, valid, stride=1, theta=theta, contrast_reach=reach)
    for n in range(2):
        # With a θ of 1 the reference gives the distances themselves.
        distances = -reference_similarity(images[n], valid[n], 1, 3, 2, 1.0).clamp(min=1e-300).log()
        known = torch.zeros(8, h, w, dtype=torch.bool)
        for k, (dy, dx) in enumerate(offsets(3, 2)):
            for y in range(h):
                for x in range(w):
                    known[k, y, x] = 0 <= y + dy < h and 0 <= x + dx < w and bool(valid[n, y + dy, x + dx])
        for y in range(h):
            for x in range(w):
                rows, columns = slice(max(0, y - reach), y + reach + 1), slice(max(0, x - reach), x + reach + 1)
                counted = known[:, rows, columns] & valid[n, rows, columns]
                around = distances[:, rows, columns][counted]
                unit = theta * max(float(around.mean()) if len(around) else 0.0, LEAST_CONTRAST)
                expected = (-distances[:, y, x] / unit).exp() * known[:, y, x]
                torch.testing.assert_close(got[n, :, y, x].double(), expected, rtol=1e-4, atol=1e-5)


def test_color_similarity_covers_the_whole_gamut() -> None:
    images = torch.randint(0, 256, (1, 3, 12, 12), generator=generator(), dtype=torch.uint8)
    images[:, :, :3] //= 40  # the linear part of both curves
    got = losses.color_similarity(images, stride=1, dilation=1, theta=50.0)
    expected = reference_similarity(images[0], torch.ones(12, 12, dtype=torch.bool), 1, 3, 1, 50.0)
    torch.testing.assert_close(got[0].double(), expected, rtol=1e-4, atol=1e-5)


def test_only_the_neighbours_validity_counts() -> None:
    valid = torch.ones(1, 3, 3, dtype=torch.bool)
    valid[0, 1, 1] = False
    similarity = losses.color_similarity(torch.full((1, 3, 3, 3), 9.0), valid, stride=1, dilation=1)
    assert similarity[0, :, 1, 1].tolist() == [1.0] * 8  # the invalid cell still sees its valid neighbours
    assert similarity[0, 4, 1, 0] == 0  # its left neighbour does not see it (4 is the one to the right)
    assert similarity[0, 0, 0, 0] == 0  # outside the image


def test_a_cell_is_valid_when_the_pixel_at_its_centre_is() -> None:
    valid = torch.zeros(1, 8, 8, dtype=torch.bool)
    valid[0, 2::4, 2::4] = True
    images = torch.zeros(1, 3, 8, 8)
    assert losses.color_similarity(images, valid, dilation=1)[0, 4, 0, 0] == 1
    assert losses.color_similarity(images, ~valid, dilation=1).sum() == 0


def test_color_similarity_is_the_same_for_bytes_and_floats_and_for_each_image_alone() -> None:
    images = torch.randint(0, 256, (3, 3, 16, 24), generator=generator(), dtype=torch.uint8)
    valid = torch.rand(3, 16, 24, generator=generator(1)) > 0.2
    together = losses.color_similarity(images, valid)
    assert torch.equal(together, losses.color_similarity(images.float(), valid))
    for n in range(3):
        alone = losses.color_similarity(images[n : n + 1], valid[n : n + 1])
        torch.testing.assert_close(together[n : n + 1], alone, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------------------------ pairwise


@pytest.mark.parametrize(
    ("h", "w", "kernel_size", "dilation"),
    [(7, 6, 3, 2), (7, 6, 3, 1), (6, 7, 5, 1), (7, 7, 5, 2), (1, 6, 3, 1), (6, 1, 3, 2), (2, 2, 3, 2), (3, 2, 5, 1)],
)
def test_pairwise_equals_the_reference(h: int, w: int, kernel_size: int, dilation: int) -> None:
    logits = (torch.randn(3, h, w, generator=generator(), dtype=torch.float64) * 3).requires_grad_()
    similarity = random_similarity(2, h, w, kernel_size, dilation)
    boxes = torch.rand(3, h, w, generator=generator(1)) > 0.3
    image_index = torch.tensor([1, 0, 1])
    got = losses.pairwise_loss(
        logits, similarity, boxes, image_index=image_index, kernel_size=kernel_size, dilation=dilation
    )
    expected = reference_pairwise(logits, similarity, boxes, image_index, 0.3, kernel_size, dilation)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    gradients = [torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (got, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


def test_pairwise_gradient_is_that_of_its_value() -> None:
    logits = torch.randn(2, 5, 6, generator=generator(), dtype=torch.float64, requires_grad=True)
    similarity, boxes = random_similarity(2, 5, 6), random_boxes(2, 5, 6)
    assert torch.autograd.gradcheck(lambda x: losses.pairwise_loss(x, similarity, boxes), logits)


def test_an_edge_inside_counts_twice_and_a_crossing_edge_once() -> None:
    logits = torch.tensor([[[2.0, -1.0, 0.5]]], dtype=torch.float64)
    similarity = random_similarity(1, 1, 3, dilation=1).clamp(max=0) + 1.0  # every neighbour alike
    similarity[:, 3, :, 0] = similarity[:, 4, :, 2] = 0  # none to the left of the first, to the right of the last
    for k in (0, 1, 2, 5, 6, 7):
        similarity[:, k] = 0
    boxes = torch.tensor([[[True, True, False]]])
    total, count = losses.pairwise_terms(logits, similarity, boxes, dilation=1)

    def term(a: float, b: float) -> float:
        p, q = 1 / (1 + math.exp(-a)), 1 / (1 + math.exp(-b))
        return -math.log(p * q + (1 - p) * (1 - q))

    assert count == 3
    assert total.item() == pytest.approx(2 * term(2, -1) + term(-1, 0.5))


def test_each_end_counts_by_its_own_similarity() -> None:
    """One invalid pixel beside a valid one: the valid one does not see it, it sees the valid one."""
    valid = torch.tensor([[[True, False]]])
    similarity = losses.color_similarity(torch.zeros(1, 3, 1, 2), valid, stride=1, dilation=1)
    logits = torch.tensor([[[1.0, -1.0]]])
    for inside, pairs in (([True, False], 0), ([False, True], 1), ([True, True], 1)):
        _, count = losses.pairwise_terms(logits, similarity, torch.tensor([[inside]]), dilation=1)
        assert count == pairs


def test_a_neighbour_outside_the_image_has_no_term() -> None:
    """With threshold 0 its similarity of 0 counts as a pair, as published, whose term is 0."""
    logits = torch.full((1, 1, 1), 3.0, requires_grad=True)
    total, count = losses.pairwise_terms(logits, torch.zeros(1, 8, 1, 1), torch.ones(1, 1, 1), threshold=0.0)
    assert (total.item(), count.item()) == (0.0, 8.0)


def test_windows_give_what_the_whole_grid_gives() -> None:
    h, w, margin = 12, 14, 2
    logits = torch.randn(4, h, w, generator=generator(), dtype=torch.float64, requires_grad=True)
    similarity, image_index = random_similarity(2, h, w), torch.tensor([0, 1, 1, 0])
    boxes = torch.zeros(4, h, w, dtype=torch.bool)
    # Inside, at two borders, and in a corner; windows of 8 × 9 hold each box and its margin.
    corners = torch.tensor([[3, 3], [-margin, 4], [h - 8 + margin, w - 9 + 3], [0, 0]])
    for box, (y, x) in zip(boxes, corners.tolist(), strict=True):
        box[max(0, y + margin) : max(0, y + 8 - margin), max(0, x + margin) : max(0, x + 9 - margin)] = True
    whole = losses.pairwise_terms(logits, similarity, boxes, image_index=image_index)

    def windows(values: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(values, (10, 10, 10, 10))
        cut = [v[y + 10 : y + 18, x + 10 : x + 19] for v, (y, x) in zip(padded, corners.tolist(), strict=True)]
        return torch.stack(cut)

    parts = losses.pairwise_terms(windows(logits), similarity, windows(boxes), image_index=image_index, corners=corners)
    assert whole[1] == parts[1] > 100
    torch.testing.assert_close(whole[0], parts[0])
    gradients = [torch.autograd.grad(total, logits)[0] for total in (whole[0], parts[0])]
    torch.testing.assert_close(*gradients)


def test_pairwise_in_chunks_is_pairwise_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(7, 9, 8, generator=generator(), dtype=torch.float64, requires_grad=True)
    similarity, boxes = random_similarity(7, 9, 8), random_boxes(7, 9, 8)
    results = []
    for size in (1, 3 * 72, 10_000):
        monkeypatch.setattr(losses, "_CHUNK_CPU", size)
        loss = losses.pairwise_loss(logits, similarity, boxes)
        results.append((loss, *torch.autograd.grad(loss, logits)))
    for other in results[1:]:
        torch.testing.assert_close(results[0], other)


# Boxes on 9 × 11 cells, as slices of rows and columns: inside, on each border, one cell, all, and a single row.
CROPPED = [(3, 6, 4, 8), (0, 3, 0, 4), (6, 9, 7, 11), (4, 5, 5, 6), (8, 9, 10, 11), (0, 9, 0, 11), (5, 6, 0, 11)]


def cropped_boxes(h: int, w: int) -> Tensor:
    """``CROPPED``, a mask with holes that is no rectangle, and an empty one."""
    boxes = torch.zeros(len(CROPPED) + 2, h, w, dtype=torch.bool)
    for box, (y0, y1, x0, x1) in zip(boxes, CROPPED, strict=False):
        box[y0:y1, x0:x1] = True
    boxes[-2, 2:8, 1:9] = torch.rand(6, 8, generator=generator(5)) > 0.6
    return boxes


@pytest.mark.parametrize(("kernel_size", "dilation"), [(3, 2), (3, 1), (5, 1), (3, 4)])
def test_pairwise_cut_to_the_boxes_equals_the_reference(
    monkeypatch: pytest.MonkeyPatch, kernel_size: int, dilation: int
) -> None:
    monkeypatch.setattr(losses, "_CELLS_OF_A_SMALL_MAP", 0)
    boxes = cropped_boxes(9, 11)
    logits = (torch.randn(boxes.shape, generator=generator(), dtype=torch.float64) * 3).requires_grad_()
    similarity = random_similarity(2, 9, 11, kernel_size, dilation)
    image_index = torch.arange(len(boxes)) % 2
    got = losses.pairwise_loss(
        logits, similarity, boxes, image_index=image_index, kernel_size=kernel_size, dilation=dilation
    )
    expected = reference_pairwise(logits, similarity, boxes, image_index, 0.3, kernel_size, dilation)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    gradients = [torch.autograd.grad(value, logits)[0] for value in (got, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)
    order = torch.randperm(len(boxes), generator=generator(1))
    permuted = losses.pairwise_loss(
        logits[order],
        similarity,
        boxes[order],
        image_index=image_index[order],
        kernel_size=kernel_size,
        dilation=dilation,
    )
    torch.testing.assert_close(permuted, expected)


def test_crops_hold_the_boxes_and_their_margin_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_CELLS_OF_A_SMALL_MAP", 0)
    boxes = cropped_boxes(9, 11)
    grown = torch.nn.functional.max_pool2d(boxes.float(), 5, stride=1, padding=2).bool()
    crops = losses._crops(boxes, 2)
    assert len(crops) == len(boxes) - 1, "the empty one costs nothing"
    for crop, cells in zip(crops, grown, strict=False):
        rows, columns = cells.any(1).nonzero(), cells.any(0).nonzero()
        hull = (int(rows[-1] - rows[0]) + 1) * (int(columns[-1] - columns[0]) + 1)
        assert boxes[crop].numel() == hull
        assert cells[crop[1:]].sum() == cells.sum()


def test_pairwise_cut_to_the_boxes_has_the_gradient_of_its_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_CELLS_OF_A_SMALL_MAP", 0)
    logits = torch.randn(3, 7, 6, generator=generator(), dtype=torch.float64, requires_grad=True)
    similarity, boxes = random_similarity(3, 7, 6), random_boxes(3, 7, 6)
    assert torch.autograd.gradcheck(lambda x: losses.pairwise_loss(x, similarity, boxes), logits)


def test_pairwise_cut_to_the_boxes_is_that_of_whole_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    """In single precision, on maps of the size where it is cut by itself."""
    logits = (torch.randn(5, 130, 140, generator=generator()) * 3).requires_grad_()
    boxes = random_boxes(5, 130, 140)
    similarity, index = torch.rand(2, 8, 130, 140, generator=generator()), torch.tensor([1, 1, 0, 0, 1])
    results = []
    for limit in (losses._CELLS_OF_A_SMALL_MAP, boxes[0].numel()):
        monkeypatch.setattr(losses, "_CELLS_OF_A_SMALL_MAP", limit)
        loss = losses.pairwise_loss(logits, similarity, boxes, image_index=index)
        results.append((loss, *torch.autograd.grad(loss, logits)))
        assert (len(losses._crops(boxes, 2)) == len(boxes)) == (limit < boxes[0].numel())
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-9)


def test_pairwise_is_exact_for_huge_logits_and_precise_for_confident_ones() -> None:
    similarity, boxes = torch.ones(1, 8, 3, 3), torch.ones(1, 3, 3, dtype=torch.bool)
    logits = torch.full((1, 3, 3), -1e4)
    logits[0, 1, 1] = 1e4
    logits.requires_grad_()
    total, _ = losses.pairwise_terms(logits, similarity, boxes, dilation=1)
    (gradient,) = torch.autograd.grad(total, logits)
    # Eight edges inside, each twice, of a = −b: −log P(same) = |a| − log 2.
    assert total.item() == pytest.approx(16 * (1e4 - math.log(2)), rel=1e-6)
    assert torch.isfinite(gradient).all()
    assert gradient[0, 1, 1] == pytest.approx(8.0)

    rng = generator()
    confident = torch.where(torch.rand(4, 40, 40, generator=rng) > 0.02, 8.0, -8.0)
    confident = confident + torch.randn(4, 40, 40, generator=rng)
    similarity, boxes = random_similarity(4, 40, 40), torch.ones(4, 40, 40, dtype=torch.bool)
    single = losses.pairwise_loss(confident, similarity, boxes)
    double = losses.pairwise_loss(confident.double(), similarity, boxes)
    torch.testing.assert_close(single.double(), double, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_raised_to_single(dtype: torch.dtype) -> None:
    half = (torch.randn(2, 6, 6, generator=generator()) * 4).to(dtype).requires_grad_()
    single = half.detach().float().requires_grad_()
    similarity, boxes = random_similarity(2, 6, 6), random_boxes(2, 6, 6)
    for loss in (
        lambda x: losses.pairwise_loss(x, similarity, boxes),
        lambda x: losses.projection_loss(x, boxes),
        lambda x: losses.dice_loss(x, boxes),
        lambda x: losses.focal_loss(x.flatten(1), boxes.flatten(1)),
        lambda x: losses.centerness_loss(x.flatten(), torch.rand(72, generator=generator())),
    ):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss(half)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, loss(single))
        (gradient,) = torch.autograd.grad(value, half)
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient.float(), torch.autograd.grad(loss(single), single)[0], rtol=1e-2, atol=1e-4)


# ------------------------------------------------------------------------------------------------ projection and dice


def test_projection_equals_the_reference() -> None:
    logits = (torch.randn(4, 7, 9, generator=generator(), dtype=torch.float64) * 3).requires_grad_()
    boxes = random_boxes(4, 7, 9)
    got, expected = losses.projection_loss(logits, boxes), reference_projection(logits, boxes)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(value, logits)[0] for value in (got, expected)]
    torch.testing.assert_close(*gradients)
    assert torch.equal(got, losses.projection_loss(logits, boxes.float()))


def test_projection_is_zero_for_a_mask_that_touches_all_sides_only() -> None:
    """The loss sees the extent alone: a cross is as good as the full box."""
    boxes = torch.zeros(1, 9, 9, dtype=torch.bool)
    boxes[0, 2:7, 1:8] = True
    cross = torch.full((1, 9, 9), -50.0)
    cross[0, 4, 1:8] = cross[0, 2:7, 4] = 50.0
    assert losses.projection_loss(cross, boxes) == pytest.approx(0, abs=1e-5)
    cross[0, 4, 0] = 50.0
    assert losses.projection_loss(cross, boxes) > 0.05


def test_dice_equals_the_reference() -> None:
    logits = torch.randn(3, 5, 6, generator=generator(), dtype=torch.float64, requires_grad=True)
    masks = torch.rand(3, 5, 6, generator=generator(1)) > 0.5
    expected = []
    for x, t in zip(logits.sigmoid(), masks.double(), strict=True):
        expected.append(1 - 2 * (x * t).sum() / ((x**2).sum() + (t**2).sum() + 1e-5))
    torch.testing.assert_close(losses.dice_terms(logits, masks), torch.stack(expected))
    torch.testing.assert_close(losses.dice_loss(logits, masks), torch.stack(expected).mean())
    assert torch.autograd.gradcheck(lambda x: losses.dice_loss(x, masks), logits)


# ------------------------------------------------------------------------------------------------ all mask losses


def mask_losses(logits: Tensor, similarity: Tensor, boxes: Tensor, index: Tensor) -> Tensor:
    return torch.stack(
        [
            losses.projection_loss(logits, boxes),
            losses.pairwise_loss(logits, similarity, boxes, image_index=index),
            losses.dice_loss(logits, boxes),
        ]
    )


def test_permuting_the_instances_changes_nothing() -> None:
    logits, boxes = torch.randn(5, 8, 8, generator=generator(), dtype=torch.float64), random_boxes(5, 8, 8)
    similarity, index = random_similarity(2, 8, 8), torch.tensor([0, 1, 0, 1, 1])
    order = torch.tensor([3, 0, 4, 2, 1])
    torch.testing.assert_close(
        mask_losses(logits, similarity, boxes, index),
        mask_losses(logits[order], similarity, boxes[order], index[order]),
    )


def test_the_terms_of_a_batch_are_those_of_its_instances() -> None:
    logits, boxes = torch.randn(5, 8, 8, generator=generator(), dtype=torch.float64), random_boxes(5, 8, 8)
    similarity, index = random_similarity(2, 8, 8), torch.tensor([0, 1, 0, 1, 1])
    total, count = losses.pairwise_terms(logits, similarity, boxes, image_index=index)
    projections, dices, totals, counts = [], [], [], []
    for n in range(5):
        one = slice(n, n + 1)
        projections.append(losses.projection_terms(logits[one], boxes[one]))
        dices.append(losses.dice_terms(logits[one], boxes[one]))
        part = losses.pairwise_terms(logits[one], similarity, boxes[one], image_index=index[one])
        totals.append(part[0])
        counts.append(part[1])
    torch.testing.assert_close(losses.projection_terms(logits, boxes), torch.cat(projections))
    torch.testing.assert_close(losses.dice_terms(logits, boxes), torch.cat(dices))
    torch.testing.assert_close(total, torch.stack(totals).sum())
    assert count == sum(counts)


def test_without_instances_the_losses_are_zero_and_differentiable() -> None:
    source = torch.randn(3, requires_grad=True)
    logits = source.sum() * torch.zeros(0, 6, 7)
    boxes, index = torch.zeros(0, 6, 7, dtype=torch.bool), torch.zeros(0, dtype=torch.int64)
    value = mask_losses(logits, random_similarity(2, 6, 7), boxes, index)
    value = value.sum() + losses.focal_loss(logits.flatten(1), boxes.flatten(1))
    value = value + losses.giou_loss(logits.new_zeros(0, 4), torch.zeros(0, 4), torch.zeros(0))
    value.backward()
    assert value == 0
    assert source.grad is not None
    assert source.grad.tolist() == [0, 0, 0]


def test_an_empty_box_mask_gives_finite_losses() -> None:
    logits = torch.randn(1, 6, 6, generator=generator(), requires_grad=True)
    boxes = torch.zeros(1, 6, 6, dtype=torch.bool)
    value = mask_losses(logits, random_similarity(1, 6, 6), boxes, torch.tensor([0]))
    value.sum().backward()
    assert value.tolist() == pytest.approx([2.0, 0.0, 1.0])
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


# ------------------------------------------------------------------------------------------------ detection


def test_focal_equals_the_equation() -> None:
    logits = torch.randn(6, 3, generator=generator(), dtype=torch.float64, requires_grad=True)
    targets = torch.rand(6, 3, generator=generator(1)) > 0.7
    expected = 0.0
    for z, t in zip(logits.flatten().tolist(), targets.flatten().tolist(), strict=True):
        p = 1 / (1 + math.exp(-z))
        p_t, alpha_t = (p, 0.25) if t else (1 - p, 0.75)
        expected -= alpha_t * (1 - p_t) ** 2 * math.log(p_t)
    assert losses.focal_loss(logits, targets).item() == pytest.approx(expected)
    assert torch.autograd.gradcheck(lambda x: losses.focal_loss(x, targets), logits)


def test_giou_equals_the_equation() -> None:
    rng = generator()
    distances = (torch.rand(5, 4, generator=rng, dtype=torch.float64) * 8).requires_grad_()
    targets = torch.rand(5, 4, generator=rng, dtype=torch.float64) * 8 + 0.1
    weights = torch.rand(5, generator=rng, dtype=torch.float64)
    expected = 0.0
    for d, t, weight in zip(distances.tolist(), targets.tolist(), weights.tolist(), strict=True):
        # Boxes around the location (0, 0).
        a, b = (-d[0], -d[1], d[2], d[3]), (-t[0], -t[1], t[2], t[3])
        overlap = (min(a[2], b[2]) - max(a[0], b[0])) * (min(a[3], b[3]) - max(a[1], b[1]))
        union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap
        hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
        expected += weight * (1 - ((overlap + 1) / (union + 1) - (hull - union) / hull))
    assert losses.giou_loss(distances, targets, weights).item() == pytest.approx(expected)
    assert losses.giou_loss(targets, targets).item() == pytest.approx(0)
    assert torch.autograd.gradcheck(lambda x: losses.giou_loss(x, targets, weights), distances)


def test_centerness_equals_the_equation() -> None:
    logits, targets = torch.tensor([0.3, -2.0]), torch.tensor([0.9, 0.1])
    expected = 0.0
    for z, t in zip(logits.tolist(), targets.tolist(), strict=True):
        p = 1 / (1 + math.exp(-z))
        expected -= t * math.log(p) + (1 - t) * math.log(1 - p)
    assert losses.centerness_loss(logits, targets).item() == pytest.approx(expected)
    padded = [torch.cat([x, torch.ones(2)]) for x in (logits, targets)]
    assert losses.centerness_loss(*padded, torch.tensor([1.0, 1, 0, 0])).item() == pytest.approx(expected)


def test_warmup_rises_linearly_and_stays() -> None:
    assert [losses.warmup(step, 4) for step in (0, 1, 2, 4, 9)] == [0, 0.25, 0.5, 1, 1]
    assert losses.warmup(0, 0) == 1


# ------------------------------------------------------------------------------------------------ GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_the_losses_never_wait_for_the_device_and_equal_those_of_the_cpu() -> None:
    rng = generator()
    images = torch.randint(0, 256, (2, 3, 64, 96), generator=rng, dtype=torch.uint8)
    logits, boxes = torch.randn(5, 16, 24, generator=rng), random_boxes(5, 16, 24)
    index, corners = torch.tensor([0, 1, 1, 0, 1]), torch.tensor([[0, 0], [-2, 3], [1, -2], [4, 4], [0, 9]])

    def run(images: Tensor, logits: Tensor, boxes: Tensor, index: Tensor, corners: Tensor) -> list[Tensor]:
        similarity = losses.color_similarity(images, images[:, 0] > 9, theta=20.0)
        values = mask_losses(logits, similarity, boxes, index).sum()
        values = values + losses.pairwise_terms(logits, similarity, boxes, image_index=index, corners=corners)[0]
        return [similarity, values, *torch.autograd.grad(values, logits)]

    on_cpu = run(images, logits.requires_grad_(), boxes, index, corners)
    moved = [x.detach().cuda() for x in (images, logits, boxes, index, corners)]
    moved[1].requires_grad_()
    run(*moved)  # libraries are loaded at first use, which waits
    torch.cuda.set_sync_debug_mode("error")
    try:
        on_gpu = run(*moved)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(on_cpu, on_gpu, strict=True):
        torch.testing.assert_close(a, b.cpu(), rtol=1e-4, atol=1e-5)
