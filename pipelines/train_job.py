"""What the driver hands to the training workers. Light, as Ray's controller, which never trains, loads it too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.config import TrainConfig
from pipelines.feed import ShardIndex

RECORD = "run.json"
"""In a run's folder, from before its first worker: what was asked for."""


@dataclass(frozen=True)
class Job:
    """What the driver hands to every worker."""

    config: TrainConfig
    """Complete: ``steps``, the classes and the contrast stretch are filled in."""
    shards_hash: str
    val: ShardIndex | None
    init: Mapping[str, bytes] | None
    """The packed model to fine-tune from."""
    run_id: str
    tracking_uri: str
    control: Any
    """Handle of the driver's Control actor."""
