"""The currency of the package: what is known of an image (Targets) and what is predicted for it (Instances).

Shape letters: N images, n instances of one image, H and W pixels, h and w grid cells.
Boxes are xyxy in continuous pixel coordinates: the pixel in column c covers [c, c + 1].
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from boxinst.errors import InputError


@dataclass
class Targets:
    """The labels of one image.

    Every instance has a box and a class; some have a mask as well (``has_mask``). ``tight`` is False for a
    box that a crop has cut: it still bounds the object but no longer touches it on every side, so the box
    losses must leave it out.
    """

    boxes: Tensor
    """[n, 4] float32, xyxy pixels."""
    labels: Tensor
    """[n] int64, index into the class list."""
    masks: Tensor | None = None
    """[n, H, W] bool in the pixels of the image the boxes refer to, or None when no instance has a mask."""
    has_mask: Tensor = field(default=None)  # type: ignore[assignment]
    """[n] bool: which rows of ``masks`` are labels (the others are zeros and mean nothing)."""
    tight: Tensor = field(default=None)  # type: ignore[assignment]
    """[n] bool: the box touches the object on all four sides. All True unless a crop has cut it."""
    ids: Tensor = field(default=None)  # type: ignore[assignment]
    """[n] int64 annotation ids; 0..n-1 when not given."""
    crowd: Tensor = field(default=None)  # type: ignore[assignment]
    """[n] bool: a crowd region, which is neither trained on nor counted against a detector."""

    def __post_init__(self) -> None:
        if self.boxes.ndim != 2 or self.boxes.shape[1] != 4:
            raise InputError("Targets.boxes", tuple(self.boxes.shape), "Give a tensor of shape [n, 4] (xyxy).")
        n, device = len(self.boxes), self.boxes.device
        if self.masks is None:
            # Elsewhere one would have to wait for the answer; targets are made in host memory.
            on_host = self.has_mask is not None and self.has_mask.device.type == "cpu"
            if on_host and bool(self.has_mask.any()):
                raise InputError("Targets.has_mask", "True without masks", "Give the masks [n, H, W] too.")
            self.has_mask = torch.zeros(n, dtype=torch.bool, device=device)
        elif self.has_mask is None:
            self.has_mask = torch.ones(n, dtype=torch.bool, device=device)
        if self.tight is None:
            self.tight = torch.ones(n, dtype=torch.bool, device=device)
        if self.ids is None:
            self.ids = torch.arange(n, device=device)
        if self.crowd is None:
            self.crowd = torch.zeros(n, dtype=torch.bool, device=device)
        for name in ("labels", "masks", "has_mask", "tight", "ids", "crowd"):
            value = getattr(self, name)
            if value is not None and len(value) != n:
                raise InputError(f"Targets.{name}", f"{len(value)} rows", f"There are {n} boxes: give as many rows.")

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, index: Tensor) -> Targets:
        """The instances that ``index`` (bool [n] or int64 [m]) selects."""
        return Targets(
            self.boxes[index],
            self.labels[index],
            None if self.masks is None else self.masks[index],
            self.has_mask[index],
            self.tight[index],
            self.ids[index],
            self.crowd[index],
        )

    def to(self, device: torch.device | str) -> Targets:
        """The same targets on ``device``."""
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in _TENSORS}
        masks = None if self.masks is None else self.masks.to(device, non_blocking=True)
        return replace(self, masks=masks, **moved)


_TENSORS = ("boxes", "labels", "has_mask", "tight", "ids", "crowd")


@dataclass
class Instances:
    """The prediction for one image, in that image's own pixels."""

    boxes: Tensor
    """[n, 4] float32, xyxy pixels."""
    scores: Tensor
    """[n] float32 in 0..1."""
    labels: Tensor
    """[n] int64, index into the class list."""
    masks: Tensor
    """[n, H, W] bool."""
    mask_logits: Tensor | None = None
    """[n, H, W] float32, only where asked for."""

    def __len__(self) -> int:
        return len(self.boxes)


@dataclass
class Batch:
    """Images of one training step, padded at right and bottom to one size."""

    images: Tensor
    """[N, 3, H, W] uint8 or float32, RGB in 0..255; padding is 0."""
    valid: Tensor
    """[N, H, W] bool: True on real pixels that may take part in the colour edges."""
    targets: list[Targets]
    """N entries; their masks are [n, H, W] with the padded H and W."""
    image_ids: list[int]
    """N entries."""
    sizes: list[tuple[int, int]] = field(default_factory=list)
    """N entries (height, width) before padding; the padded size when not given."""
    host: list[Targets] = field(default_factory=list)
    """``targets`` in host memory: what is planned from the labels then never waits for the device."""

    def __post_init__(self) -> None:
        if not self.host:
            self.host = [t.to("cpu") for t in self.targets]
        if not self.sizes:
            self.sizes = [(self.images.shape[2], self.images.shape[3])] * len(self.images)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on ``device``; its ``host`` stays where it is."""
        return Batch(
            self.images.to(device, non_blocking=True),
            self.valid.to(device, non_blocking=True),
            [t.to(device) for t in self.targets],
            self.image_ids,
            self.sizes,
            self.host,
        )
