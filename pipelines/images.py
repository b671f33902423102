"""An image file's bytes as RGB pixels, whatever the file's mode, and its size in the frame that the boxes refer to."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

Exif = Literal["stored", "applied"]
"""Whether boxes refer to the pixels as stored in the file, or as turned by the EXIF orientation that it carries."""

_TURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What each EXIF orientation asks for; 5 to 8 swap width and height."""

_TURN_BACK = {**_TURN, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}


def size(data: bytes, *, exif: Exif = "stored") -> tuple[int, int]:
    """Width and height, from the file's header alone.

    Raises:
        ValueError: not an image.
    """
    with _opened(data) as image:
        width, height = image.size
        # Pillow gives the size of a TIFF file as turned, and of all others as stored.
        if _orientation(image) >= 5 and (exif == "applied") != (image.format == "TIFF"):
            width, height = height, width
        return width, height


def decode(data: bytes, *, exif: Exif = "stored") -> NDArray[np.uint8]:
    """Pixels as RGB uint8 [H, W, 3].

    Grey is repeated, 16-bit values are divided by 257 (65535 becomes 255), palettes and CMYK are converted, and alpha
    is dropped without blending. Of a file with several pages the first counts.

    Args:
        data: content of the file.
        exif: ``stored`` leaves the pixels as they lie in the file, ``applied`` turns them as the file's EXIF says.

    Raises:
        ValueError: not an image, cut off, corrupt, too large to be true, or of a pixel type without a known range.
    """
    with _opened(data) as image:
        orientation = _orientation(image)
        image.load()
        # Pillow turns TIFF files while it loads them, and leaves all others as they are.
        loaded_turned = image.format == "TIFF"
        turn = None
        if (exif == "applied") != loaded_turned:
            turn = (_TURN_BACK if loaded_turned else _TURN).get(orientation)
        return _rgb(image if turn is None else image.transpose(turn))


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """The image, where every failure of Pillow is a ValueError: its readers raise anything on corrupt bytes."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            yield image
    except Exception as error:
        raise ValueError(str(error).split(" <_io")[0] or repr(error)) from error


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8."""
    value = image.getexif().get(ExifTags.Base.Orientation, 1)
    return value if value in _TURN else 1


def _rgb(image: Image.Image) -> NDArray[np.uint8]:
    """RGB uint8 [H, W, 3] of a loaded image of any mode."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range: save the image with 8 or 16 bits")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"pixels from {values.min()} to {values.max()}: save the image with 8 or 16 bits")
        grey = ((values + 128) // 257).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if "transparency" in image.info:  # Pillow warns unless such a palette goes by way of RGBA
        image = image.convert("RGBA")
    return np.array(image.convert("RGB"))
