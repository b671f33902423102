"""From a trained network to Instances in the pixels of the given images: by prompts, or by detection.

Shape letters: N images, P instances, H and W pixels, h and w cells of the mask grid.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from boxinst.dynamic import HeadShape, aligned_upsample, dynamic_masks
from boxinst.errors import InputError
from boxinst.fcos import decode, locations
from boxinst.prompts import CELLS_AT_ONCE, box_crops, prompt_masks
from boxinst.structures import Instances
from boxinst.transforms import contrast_stretch

if TYPE_CHECKING:
    from boxinst.condinst import CondInst, Outputs

_LEAST = torch.finfo(torch.float64).tiny
"""Probability whose logarithm is still finite."""

_IMAGES_AT_ONCE = 4

MIRRORS: tuple[tuple[int, ...], ...] = ((), (2,), (1,), (1, 2))
"""Axes of an image [3, H, W] flipped in each view, of which a model takes the first ``ModelConfig.views``."""


def segment(
    model: CondInst,
    images: list[Tensor],
    boxes: list[Tensor],
    labels: list[Tensor] | None = None,
    *,
    logits: bool = False,
) -> list[Instances]:
    """One mask for every given box, in the order given.

    A mask never leaves its box, and reaches all four of its sides where it can; see ``reaching``. Where the model's
    config has ``views``, probabilities are means over the mirrored images. Where it is ``exclusive``, a pixel in
    several boxes belongs to the mask with the highest probability there, so that all boxes of an image must be given at
    once; a mask that would be left without a pixel keeps its own.
    The score is the IoU that the probabilities promise the mask, times the ``outline_contrast`` of the mask.

    Args:
        model: a network with the prompt head.
        images: N uint8 RGB [3, H, W], of any sizes.
        boxes: N float xyxy [n, 4] in the pixels of their image.
        labels: N int64 [n], carried over to the result; zeros when None.
        logits: also return the mask logits at the image's resolution.

    Raises:
        InputError: the model has no prompt head, or images, boxes and labels do not match.
    """
    if model.prompt_head is None:
        raise InputError("model", "has no prompt head", "Train with model.prompt on, or use detect().")
    _check(images, boxes, labels)
    labels = labels or [torch.zeros(len(b), dtype=torch.int64) for b in boxes]
    result: list[Instances | None] = [None] * len(images)
    mirrors = MIRRORS[1 : model.config.views]
    mirrored = (
        _passes(
            model,
            [image.flip(axes) for image in images],
            [mirror_boxes(b, axes, (image.shape[1], image.shape[2])) for b, image in zip(boxes, images, strict=True)],
        )
        for axes in mirrors
    )
    with _evaluating(model):
        for (members, batch, outputs, given), *others in zip(_passes(model, images, boxes), *mirrored, strict=True):
            assert outputs.prompt is not None
            start = 0
            for k, n in enumerate(members):
                end = start + len(given[k])
                height, width = images[n].shape[-2:]
                views = [
                    [
                        crop.flip([axis - 1 for axis in axes])
                        for crop in box_crops(model, o, k, start, seen[k], (height, width))
                    ]
                    for axes, (_, _, o, seen) in zip(mirrors, others, strict=True)
                ]
                result[n] = prompt_masks(
                    model,
                    outputs.mask_features[k : k + 1],
                    outputs.prompt[start:end],
                    given[k],
                    batch[k],
                    images[n],
                    logits,
                    views,
                )
                result[n].boxes, result[n].labels = boxes[n].float(), labels[n]
                start = end
    return result  # type: ignore[return-value]


def mirror_boxes(boxes: Tensor, axes: Sequence[int], size: tuple[int, int]) -> Tensor:
    """Boxes [n, 4] xyxy of an image of (height, width) in the image flipped along ``axes``, 1 down and 2 across."""
    x0, y0, x1, y1 = boxes.unbind(1)
    if 2 in axes:
        x0, x1 = size[1] - x1, size[1] - x0
    if 1 in axes:
        y0, y1 = size[0] - y1, size[0] - y0
    return torch.stack([x0, y0, x1, y1], 1)


def detect(
    model: CondInst,
    images: list[Tensor],
    *,
    score_threshold: float = 0.05,
    max_detections: int = 100,
    logits: bool = False,
    sizes: Sequence[tuple[int, int]] | None = None,
) -> list[Instances]:
    """Detections with masks, best first. Masks are not cropped to their boxes, as published.

    Probabilities, not logits, are brought to the image's resolution, and a pixel above ½ belongs to the mask.

    Args:
        model: a network with the FCOS head.
        images: N uint8 RGB [3, H, W], of any sizes.
        score_threshold: least class × centre-ness of a candidate.
        max_detections: kept per image, after non-maximum suppression.
        logits: also return the mask logits, log(p / (1 − p)), at the resolution of the masks.
        sizes: N (height, width) in whose pixels boxes and masks are wanted, where the images were resized for the
            network; those of the images when None.

    Raises:
        InputError: the model has no FCOS head.
    """
    if model.dense_head is None:
        raise InputError("model", "has no detection head", "Train with model.detect on, or use segment() with boxes.")
    _check(images, None, None)
    if sizes is not None and len(sizes) != len(images):
        raise InputError("sizes", f"{len(sizes)} entries", f"There are {len(images)} images: give one entry for each.")
    result: list[Instances | None] = [None] * len(images)
    head, stride = HeadShape.of(model.config), model.config.mask_stride
    with _evaluating(model):
        for members, _, outputs, _ in _passes(model, images, None):
            assert outputs.dense is not None
            places = locations(outputs.dense.grids, outputs.mask_features.device)
            for k, n in enumerate(members):
                height, width = images[n].shape[-2:]
                found = decode(
                    outputs.dense,
                    k,
                    (height, width),
                    score_threshold=score_threshold,
                    max_detections=max_detections,
                )
                rows, columns = (height, width) if sizes is None else sizes[n]
                parameters = outputs.dense.controllers.at(k, found.location)
                scales = places.sizes[found.location]
                masks = torch.zeros((len(found.boxes), rows, columns), dtype=torch.bool)
                raw = torch.zeros((len(found.boxes), rows, columns)) if logits else None
                cells = outputs.mask_features.shape[-1] * outputs.mask_features.shape[-2]
                at_once = max(1, CELLS_AT_ONCE // max(cells * stride, rows * columns // 8))
                for part in torch.arange(len(found.boxes)).split(at_once):
                    where = found.location[part]
                    maps = dynamic_masks(
                        outputs.mask_features[k : k + 1],
                        [0] * len(part),
                        parameters[part],
                        places.points[where],
                        scales[part, None].expand(-1, 2),
                        head=head,
                        stride=stride,
                    ).float()
                    maps = aligned_upsample(maps, 2)
                    inside = _to_image(maps.sigmoid(), stride // 2, (height, width), (rows, columns))
                    masks[part] = (inside > 0.5).cpu()
                    if raw is not None:
                        # The counter-probability on its own, since 1 − p has no digits left where p is near 1, and
                        # both in double precision, in which a logit of −100 still has a probability.
                        p, q = (
                            _to_image((sign * maps.double()).sigmoid(), stride // 2, (height, width), (rows, columns))
                            for sign in (1, -1)
                        )
                        raw[part] = (p.clamp(min=_LEAST).log() - q.clamp(min=_LEAST).log()).float().cpu()
                boxes = found.boxes * found.boxes.new_tensor([columns / width, rows / height] * 2)
                result[n] = Instances(boxes.cpu(), found.scores.cpu(), found.labels.cpu(), masks, raw)
    return result  # type: ignore[return-value]


def _to_image(maps: Tensor, factor: int, size: tuple[int, int], wanted: tuple[int, int]) -> Tensor:
    """Maps [P, h, w] of a padded image up-sampled by ``factor``, without the padding, at the (height, width) wanted."""
    fine = aligned_upsample(maps, factor)[:, : size[0], : size[1]]
    if size == wanted:
        return fine
    return F.interpolate(fine[:, None], wanted, mode="bilinear", align_corners=False)[:, 0]


def _check(images: list[Tensor], boxes: list[Tensor] | None, labels: list[Tensor] | None) -> None:
    for n, image in enumerate(images):
        if image.ndim != 3 or image.shape[0] != 3 or image.dtype != torch.uint8:
            found = f"{image.dtype} {tuple(image.shape)}"
            raise InputError(f"images[{n}]", found, "Give uint8 RGB of shape [3, H, W].")
    for name, lists in (("boxes", boxes), ("labels", labels)):
        if lists is not None and len(lists) != len(images):
            raise InputError(name, f"{len(lists)} entries", f"There are {len(images)} images: give one entry for each.")
    for n, given in enumerate(boxes or []):
        if given.ndim != 2 or given.shape[1] != 4 or not bool(torch.isfinite(given).all()):
            raise InputError(f"boxes[{n}]", tuple(given.shape), "Give finite xyxy boxes of shape [n, 4].")
        if labels is not None and len(labels[n]) != len(given):
            raise InputError(f"labels[{n}]", f"{len(labels[n])} entries", f"There are {len(given)} boxes.")


@contextmanager
def _evaluating(model: CondInst) -> Iterator[None]:
    """No gradients, and the network in evaluation mode; both as they were afterwards.

    Around all passes and in none of them: as generators they end in another order than they began.
    """
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def _passes(
    model: CondInst, images: list[Tensor], boxes: list[Tensor] | None
) -> Iterator[tuple[list[int], Tensor, Outputs, list[Tensor]]]:
    """Runs the network over images of equal padded size together, so that a batch gives what each image alone gives.

    Yields the positions of the images, the images as the network sees them (uint8, padded), the outputs and the boxes,
    on the model's device.
    """
    device = model.pixel_mean.device
    groups: dict[tuple[int, int], list[int]] = {}
    for n, image in enumerate(images):
        height, width = image.shape[-2:]
        groups.setdefault((-(-height // 32) * 32, -(-width // 32) * 32), []).append(n)
    for (height, width), all_members in groups.items():
        for start in range(0, len(all_members), _IMAGES_AT_ONCE):
            members = all_members[start : start + _IMAGES_AT_ONCE]
            batch = torch.zeros((len(members), 3, height, width), dtype=torch.uint8)
            for k, n in enumerate(members):
                image = images[n]
                if model.config.contrast_stretch is not None:
                    image = contrast_stretch(image, *model.config.contrast_stretch)
                batch[k, :, : image.shape[1], : image.shape[2]] = image
            given = [boxes[n].to(device, torch.float32) for n in members] if boxes is not None else []
            sizes = [(images[n].shape[1], images[n].shape[2]) for n in members]
            batch = batch.to(device)
            # Given boxes need none of the dense head, which is about a third of the network.
            prompts = None if boxes is None else given
            outputs = model(batch, prompts, sizes, detect=prompts is None)
            yield members, batch, outputs, given
