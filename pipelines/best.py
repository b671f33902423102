"""The best model of a run so far, kept beside the checkpoints, which are only the latest ones.

``best.json`` names its folder and is written when that folder is whole; then the one before is removed.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import pyarrow.fs as pafs

import boxinst
from boxinst.condinst import CondInst

RECORD = "best.json"

SCORES = ("mask_iou", "mask_ap", "box_iou")
"""What makes a model the best: the first of these metrics that its validation has. More is better in all."""


class Best:
    """The best model below ``folder`` on ``fs``, where a run keeps its checkpoints."""

    def __init__(self, fs: pafs.FileSystem, folder: str) -> None:
        self._fs, self._folder = fs, folder

    def record(self) -> dict[str, Any]:
        """``score`` (a metric's name), its ``value``, ``step`` and ``folder`` (a name); empty when there is none."""
        try:
            with self._fs.open_input_file(f"{self._folder}/{RECORD}") as stream:
                return json.loads(stream.read())
        except (FileNotFoundError, ValueError):  # none, or one that was just being written
            return {}

    def offer(self, model: CondInst, step: int, metrics: Mapping[str, float]) -> None:
        """Keep ``model`` if it is better than the one kept. A step that is repeated does not write its equal again."""
        score = next((name for name in SCORES if name in metrics), None)
        before = self.record()
        if score is None or (before.get("score") == score and metrics[score] <= before["value"]):
            return
        name = f"best_{step:08d}"
        with tempfile.TemporaryDirectory() as made:
            boxinst.save(model, made)
            self._fs.create_dir(f"{self._folder}/{name}", recursive=True)
            pafs.copy_files(made, f"{self._folder}/{name}", destination_filesystem=self._fs)
        record = {"score": score, "value": metrics[score], "step": step, "folder": name}
        with self._fs.open_output_stream(f"{self._folder}/{RECORD}") as stream:
            stream.write(json.dumps(record).encode())
        if before and before["folder"] != name:
            with suppress(FileNotFoundError):
                self._fs.delete_dir(f"{self._folder}/{before['folder']}")
