"""Every kind of image file becomes RGB, in the frame that the boxes refer to."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
from PIL import Image

from pipelines.images import decode, size

HEIGHT, WIDTH = 6, 9


def pixels(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def save(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def oriented(image: Image.Image, orientation: int, kind: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    if kind == "JPEG":
        return save(image, kind, exif=exif, quality=100, subsampling=0)
    return save(image, kind, exif=exif)


def test_rgb_is_unchanged() -> None:
    expected = pixels()
    found = decode(save(Image.fromarray(expected)))
    assert found.dtype == np.uint8
    assert found.flags.writeable
    assert np.array_equal(found, expected)


def test_grey_is_repeated() -> None:
    grey = pixels()[..., 0]
    assert np.array_equal(decode(save(Image.fromarray(grey))), np.repeat(grey[..., None], 3, 2))


def test_alpha_is_dropped_without_blending() -> None:
    rgba = np.concatenate([pixels(), pixels(1)[..., :1]], 2)
    assert np.array_equal(decode(save(Image.fromarray(rgba))), rgba[..., :3])
    la = np.stack([pixels()[..., 0], pixels(1)[..., 0]], 2)
    assert np.array_equal(decode(save(Image.fromarray(la, "LA")))[..., 1], la[..., 0])


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled(kind: str) -> None:
    deep = np.array([[0, 256, 257, 65535], [128, 129, 32896, 65407]], np.uint16)
    found = decode(save(Image.fromarray(deep), kind))
    assert np.array_equal(found[..., 0], np.rint(deep / 257))
    assert np.array_equal(found[..., 0], found[..., 2])


def test_big_endian_sixteen_bits() -> None:
    deep = np.arange(0, 65536, 4096, dtype=np.uint16).reshape(4, 4)
    image = Image.frombytes("I;16B", (4, 4), deep.astype(">u2").tobytes())
    assert np.array_equal(decode(save(image, "TIFF"))[..., 0], np.rint(deep / 257))


def test_palette() -> None:
    image = Image.fromarray(pixels()).quantize(8)
    assert np.array_equal(decode(save(image)), np.asarray(image.convert("RGB")))
    assert np.array_equal(decode(save(image, transparency=bytes([0, 128] * 4))), np.asarray(image.convert("RGB")))


def test_cmyk() -> None:
    image = Image.fromarray(np.full((8, 8, 3), (200, 40, 90), np.uint8)).convert("CMYK")
    assert np.abs(decode(save(image, "JPEG", quality=100)).astype(int) - (200, 40, 90)).max() < 8


def test_one_bit() -> None:
    bits = pixels()[..., 0] > 127
    assert np.array_equal(decode(save(Image.fromarray(bits)))[..., 0], bits * 255)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_exif(orientation: int, kind: str) -> None:
    blocks = np.kron(np.array([[20, 90, 160], [230, 60, 120]], np.uint8), np.ones((8, 8), np.uint8))
    data = oriented(Image.fromarray(blocks), orientation, kind)
    # The standard: which side of the picture the stored row 0 and column 0 are.
    turned = {
        1: blocks,
        2: blocks[:, ::-1],
        3: blocks[::-1, ::-1],
        4: blocks[::-1],
        5: blocks.T,
        6: np.rot90(blocks, -1),
        7: blocks[::-1, ::-1].T,
        8: np.rot90(blocks),
    }[orientation]
    for exif, expected in (("stored", blocks), ("applied", turned)):
        found = decode(data, exif=exif)
        assert found.shape[:2] == expected.shape
        assert np.abs(found[..., 0].astype(int) - expected).max() <= 3
        assert size(data, exif=exif) == expected.shape[::-1]


@pytest.mark.parametrize(
    "data",
    [b"", b"not an image", save(Image.fromarray(pixels()))[:60], save(Image.fromarray(pixels()), "JPEG")[:-40]],
    ids=["empty", "text", "cut PNG", "cut JPEG"],
)
def test_corrupt_bytes_are_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        decode(data)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, on what it skips
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP"])
def test_damage_anywhere_gives_pixels_or_a_value_error(kind: str) -> None:
    whole = save(Image.fromarray(pixels()), kind)
    rng = np.random.default_rng(0)
    for _ in range(150):
        data = bytearray(whole)
        for place in rng.integers(0, len(data), 4):
            data[place] = rng.integers(256)
        with contextlib.suppress(ValueError):
            assert decode(bytes(data)).ndim == 3


def test_unknown_range() -> None:
    with pytest.raises(ValueError, match="no known range"):
        decode(save(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"))
    with pytest.raises(ValueError, match=r"70000.*8 or 16 bits"):
        decode(save(Image.fromarray(np.full((4, 4), 70000, np.int32)), "TIFF"))
