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
from pipelines.s3 import patiently

RECORD = "best.json"

SCORES = ("mask_iou", "mask_ap", "box_iou")
"""What makes a model the best: the first of these metrics that its validation has. More is better in all."""


def recorded(fs: pafs.FileSystem, folder: str) -> dict[str, Any]:
    """Of the model that the run in ``folder`` keeps: ``score`` (a metric's name), ``value``, ``step`` and ``folder``.

    Empty when there is none.
    """
    try:
        with fs.open_input_file(f"{folder}/{RECORD}") as stream:
            return json.loads(stream.read())
    except (FileNotFoundError, ValueError):  # none, or one that was just being written
        return {}


class Best:
    """The best model of the run in ``folder`` on ``fs``.

    A model is offered by the training and kept by whoever uploads the next checkpoint: a slow store delays no training,
    and a run that goes on from a checkpoint knows of every validation before it.
    """

    def __init__(self, fs: pafs.FileSystem, folder: str) -> None:
        self._fs, self._folder = fs, folder
        self._record = recorded(fs, folder)
        self._offered: Offer | None = None

    def offer(self, model: CondInst, step: int, metrics: Mapping[str, float]) -> None:
        """Set ``model`` aside if it is better than all before. A repeated step offers nothing new."""
        score = next((name for name in SCORES if name in metrics), None)
        if score is None or (self._record.get("score") == score and metrics[score] <= self._record["value"]):
            return
        made = tempfile.TemporaryDirectory(prefix="best_")
        boxinst.save(model, made.name)
        self._record = {"score": score, "value": metrics[score], "step": step, "folder": f"best_{step:08d}"}
        self._offered = Offer(self._fs, self._folder, self._record, made)

    def take(self) -> Offer | None:
        """The best model offered since the last call, for ``Offer.keep``; None when there was none."""
        offered, self._offered = self._offered, None
        return offered


class Offer:
    """A model in a folder of this machine, ``made``, and what ``best.json`` is to say of it."""

    def __init__(
        self,
        fs: pafs.FileSystem,
        folder: str,
        record: dict[str, Any],
        made: tempfile.TemporaryDirectory[str],
    ) -> None:
        self._fs, self._folder, self._record, self._made = fs, folder, record, made

    def keep(self) -> None:
        """Put it in the place of the one before."""
        before, name = recorded(self._fs, self._folder), self._record["folder"]
        with self._made as made:
            patiently(lambda: self._copy(made, f"{self._folder}/{name}"))
        if before and before["folder"] != name:
            with suppress(FileNotFoundError):
                self._fs.delete_dir(f"{self._folder}/{before['folder']}")

    def _copy(self, made: str, target: str) -> None:
        self._fs.create_dir(target, recursive=True)
        pafs.copy_files(made, target, destination_filesystem=self._fs)
        with self._fs.open_output_stream(f"{self._folder}/{RECORD}") as stream:
            stream.write(json.dumps(self._record).encode())
