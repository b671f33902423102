"""What review writes and feedback reads: the fields of the review dataset, the verdicts, and masks in FiftyOne's form.

FiftyOne keeps a mask as an array that is stretched over its label's box, and the box relative to the image. The
Annotate tab writes a brushed mask at the resolution of the screen and draws its box tight around it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from boxinst.errors import InputError

Verdict = Literal["accept", "reject", "fix"]
"""What a reviewer says of a mask, as a tag of its label."""

VERDICTS: tuple[Verdict, ...] = get_args(Verdict)

UNSEGMENTED = "unsegmented"
"""Tag of a label that has no mask because the model gave none."""

MASKS = "masks"
"""Field of the labels to review: the predicted masks."""

GIVEN = "given"
"""Field of the boxes as given. Each also keeps what was shown for it (``shown_box``, ``shown_mask``): from that follows
what a reviewer has changed or deleted."""

INFO = "boxinst"
"""Entry of the dataset's info: what the review was made from."""

INFO_VERSION = 1

Outcome = Literal["accepted", "edited", "rejected", "fix", "deleted", "moved", "no mask", "unreviewed"]
"""What a review says about an annotation of the corpus."""


def strictest(tags: Iterable[str] | None) -> Verdict | None:
    """The verdict of a label: of several the strictest, so that a mask in doubt does not become a label."""
    given = set(tags or ())
    order: tuple[Verdict, ...] = ("reject", "fix", "accept")
    return next((verdict for verdict in order if verdict in given), None)


def outcome(verdict: Verdict | None, *, edited: bool, moved: bool, masked: bool) -> Outcome:
    """What becomes of a label.

    Args:
        verdict: of the label.
        edited: the mask's pixels were changed.
        moved: the box was changed, the mask only with it.
        masked: there is a mask with at least one pixel.
    """
    if verdict == "reject":
        return "rejected"
    if masked and edited:  # whoever brushes a mask means the result, with or without a tag
        return "edited"
    if verdict == "fix":
        return "fix"
    if verdict == "accept":
        return "accepted" if masked else "no mask"
    if edited:
        return "no mask"
    return "moved" if moved else "unreviewed"


def digest(mask: NDArray[Any] | None) -> str:
    """Name of a mask's pixels, whatever the array's type; empty for no mask."""
    if mask is None:
        return ""
    shape = ",".join(map(str, mask.shape)).encode()
    return hashlib.sha256(shape + np.packbits(np.asarray(mask) > 0).tobytes()).hexdigest()[:16]


def relative(box: Iterable[float], width: int, height: int) -> list[float]:
    """A box xyxy in pixels as FiftyOne's [x, y, w, h] relative to the image."""
    x1, y1, x2, y2 = box
    return [x1 / width, y1 / height, (x2 - x1) / width, (y2 - y1) / height]


def pixels(bounding_box: Iterable[float], width: int, height: int) -> list[float]:
    """Inverse of ``relative``, clipped to the image."""
    x, y, w, h = bounding_box
    edges = (x * width, y * height, (x + w) * width, (y + h) * height)
    return [min(max(edge, 0.0), float(limit)) for edge, limit in zip(edges, (width, height) * 2, strict=True)]


def crop(mask: NDArray[np.bool_], box: Iterable[float]) -> tuple[list[float], NDArray[np.bool_]]:
    """A mask [H, W] as FiftyOne wants it: a box xyxy in whole pixels, and the mask's pixels inside.

    The box covers the given ``box`` and the mask where it spills over, so that no pixel is lost and none is resampled.
    """
    height, width = mask.shape
    x1, y1, x2, y2 = box
    left, top, right, bottom = math.floor(x1), math.floor(y1), math.ceil(x2), math.ceil(y2)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if len(rows):
        left, right = min(left, int(columns[0])), max(right, int(columns[-1]) + 1)
        top, bottom = min(top, int(rows[0])), max(bottom, int(rows[-1]) + 1)
    left, top, right, bottom = max(left, 0), max(top, 0), min(right, width), min(bottom, height)
    return [float(left), float(top), float(right), float(bottom)], mask[top:bottom, left:right]


def paste(mask: NDArray[Any], bounding_box: Iterable[float], width: int, height: int) -> NDArray[np.bool_]:
    """Inverse of ``crop``, for a mask of any resolution: [height, width] bool.

    A pixel of the image belongs to the mask when the mask is set at the pixel's centre.
    """
    x, y, w, h = bounding_box
    out = np.zeros((height, width), dtype=bool)
    if w <= 0 or h <= 0 or mask.size == 0:
        return out
    rows = np.floor(((np.arange(height) + 0.5) / height - y) / h * mask.shape[0]).astype(int)
    columns = np.floor(((np.arange(width) + 0.5) / width - x) / w * mask.shape[1]).astype(int)
    inside_rows = np.flatnonzero((rows >= 0) & (rows < mask.shape[0]))
    inside_columns = np.flatnonzero((columns >= 0) & (columns < mask.shape[1]))
    source = np.asarray(mask) > 0
    out[np.ix_(inside_rows, inside_columns)] = source[np.ix_(rows[inside_rows], columns[inside_columns])]
    return out


def check_info(info: Any, dataset: str) -> dict[str, Any]:
    """What a review dataset was made from.

    Raises:
        InputError: the dataset is no review, or one of a newer version.
    """
    if not isinstance(info, dict) or "version" not in info:
        value = f"{dataset!r} was not made by `boxinst review`"
        raise InputError("--dataset", value, "Give the name of a review, or another name to make one.")
    if info["version"] > INFO_VERSION:
        raise InputError("--dataset", f"{dataset!r} was made by a newer version", "Upgrade boxinst.")
    return info
