"""BoxInst: instance masks learned from boxes alone (arXiv 2012.02310).

Names are loaded when first used, so that a command that only wants an error class does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from boxinst.condinst import CondInst, load
    from boxinst.config import ModelConfig
    from boxinst.errors import InputError
    from boxinst.structures import Batch, Instances, Targets
    from boxinst.weights import save

_HOMES = {
    "Batch": "structures",
    "CondInst": "condinst",
    "InputError": "errors",
    "Instances": "structures",
    "ModelConfig": "config",
    "Targets": "structures",
    "load": "condinst",
    "save": "weights",
}
_ROOMS = {*_HOMES.values(), "criterion", "dynamic", "fcos", "losses", "metrics", "predict", "rle", "transforms"}

__all__ = ["Batch", "CondInst", "InputError", "Instances", "ModelConfig", "Targets", "load", "save"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"boxinst.{_HOMES[name]}"), name)
    if name in _ROOMS:
        return importlib.import_module(f"boxinst.{name}")
    raise AttributeError(f"module 'boxinst' has no attribute {name!r}")
