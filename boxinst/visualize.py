"""Pictures of instances over their image: for logs, reports and documentation."""

from __future__ import annotations

import colorsys
import io
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.utils import draw_bounding_boxes

Color = tuple[int, int, int]

_TITLE_HEIGHT = 16
_GAP = 4


def color_of(index: int) -> Color:
    """The colour of the instance at ``index``; neighbours in the sequence are far apart in hue."""
    golden = 0.618034  # the turn that spreads any number of hues evenly
    red, green, blue = colorsys.hsv_to_rgb(index * golden % 1, 0.65 + 0.3 * (index % 2), 1.0)
    return round(red * 255), round(green * 255), round(blue * 255)


def overlay(
    image: Tensor, boxes: Tensor | None = None, masks: Tensor | None = None, *, colors: Sequence[Color] | None = None
) -> Tensor:
    """An image with boxes, masks or both drawn over it.

    Args:
        image: uint8 RGB [3, H, W].
        boxes: [n, 4] xyxy pixels, drawn as thin outlines.
        masks: [n, H, W] bool, drawn half transparent; the later covers the earlier.
        colors: n RGB colours; by the instance's position when None.

    Returns:
        uint8 [3, H, W].
    """
    image = image.cpu()
    count = max(len(rows) for rows in (boxes, masks, ()) if rows is not None)
    palette = list(colors) if colors is not None else [color_of(i) for i in range(count)]
    if masks is not None and len(masks):
        image = _tint(image, masks.cpu(), palette)
    if boxes is not None and len(boxes):
        # An outline covers pixels x0..x1 inclusive, so the last pixel inside is one before the side.
        corners = boxes.cpu().round().long()
        corners[:, 2:] = torch.maximum(corners[:, 2:] - 1, corners[:, :2])
        image = draw_bounding_boxes(image, corners, colors=palette, width=1)
    return image


def _tint(image: Tensor, masks: Tensor, palette: Sequence[Color]) -> Tensor:
    """Blends each pixel with the colour of its mask; one blend for all masks, as there may be hundreds."""
    owner = torch.zeros(image.shape[1:], dtype=torch.int64)  # 1 + the instance's position, 0 for none
    for i, mask in enumerate(masks):
        owner.masked_fill_(mask, i + 1)
    tint = torch.tensor([(0, 0, 0), *palette], dtype=torch.float32)[owner].permute(2, 0, 1)
    return torch.where(owner > 0, (image.float() + tint) / 2, image.float()).round().to(torch.uint8)


def side_by_side(images: Sequence[Tensor], titles: Sequence[str]) -> Tensor:
    """Images in a row on white, each under its title; shorter ones are padded at the bottom.

    Args:
        images: uint8 RGB [3, H_i, W_i].
        titles: one for each.

    Returns:
        uint8 [3, H, W].
    """
    height = max(image.shape[1] for image in images)
    columns = []
    for image, title in zip(images, titles, strict=True):
        column = F.pad(image.cpu(), (0, _GAP, _TITLE_HEIGHT, height - image.shape[1]), value=255)
        strip = Image.new("RGB", (column.shape[2], _TITLE_HEIGHT), "white")
        ImageDraw.Draw(strip).text((2, 2), title, fill="black")
        column[:, :_TITLE_HEIGHT] = _from_pil(strip)
        columns.append(column)
    return torch.cat(columns, 2)[:, :, :-_GAP]


def to_png(image: Tensor) -> bytes:
    """uint8 RGB [3, H, W] as the bytes of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(image.cpu().permute(1, 2, 0).contiguous().numpy()).save(buffer, format="png")
    return buffer.getvalue()


def _from_pil(picture: Image.Image) -> Tensor:
    """RGB picture -> uint8 [3, H, W]."""
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return pixels.view(picture.height, picture.width, 3).permute(2, 0, 1)
