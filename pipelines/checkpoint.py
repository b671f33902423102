"""A training state on disk: any nesting of dicts, lists, numbers, text and tensors, as safetensors and JSON.

Nothing in it can run when it is read. ``state.json`` is written last, so that a folder without it is unfinished.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
from safetensors.torch import load_file, save_file
from torch import Tensor

from boxinst.errors import InputError
from pipelines import storage

FORMAT_VERSION = 1
TENSORS, STATE = "tensors.safetensors", "state.json"
LIST = "checkpoint_manager_snapshot.json"
"""In a run's folder: Ray's list of its checkpoints."""

_TENSOR = "__tensor__"
"""Stands in the JSON for a tensor, with its name in the safetensors file."""
_ITEMS = "__items__"
"""Stands in the JSON for a dict whose keys are no strings, such as an optimiser's, with its items."""


def save(folder: str | Path, state: Mapping[str, Any]) -> None:
    """Write ``state`` into ``folder``. Numbers and tensors come back exactly; tuples come back as lists."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    tree = _encode(dict(state), "", tensors)
    save_file(tensors, folder / TENSORS)
    partial = folder / f"{STATE}.partial"
    partial.write_text(json.dumps({"format": FORMAT_VERSION, "state": tree}))
    os.replace(partial, folder / STATE)


def upload(folder: str | Path, fs: pafs.FileSystem, target: str) -> None:
    """Copy a saved state to ``target`` on ``fs``, ``state.json`` last; what is half written is removed.

    Raises:
        OSError: no room, or the storage is away.
    """
    try:
        with suppress(FileNotFoundError):  # of the same step, by a worker that was killed before it was registered
            fs.delete_file(f"{target}/{STATE}")
        fs.create_dir(target, recursive=True)
        for name in (TENSORS, STATE):
            pafs.copy_files(f"{folder}/{name}", f"{target}/{name}", destination_filesystem=fs)
    except OSError:
        with suppress(OSError):
            fs.delete_dir(target)
        raise


def mend_list(run: str, ray_version: str) -> None:
    """Let Ray's list of a run's checkpoints, where there is one, name none that is not there.

    Ray overwrites it in place, so a full disk or a kill at the wrong moment leaves half of it: then it is made anew
    from the checkpoints that are whole. And where one that it names was removed, so that the run goes on from the one
    before, Ray by itself refuses.

    Args:
        run: the run's folder.
        ray_version: which a new list must name.
    """
    files = storage.list_files(run)
    if LIST not in files:
        return
    path = storage.join(run, LIST)
    whole = [found[1] for file in files if (found := re.fullmatch(rf"(checkpoint_\d{{8}})/{STATE}", file))]
    try:
        listed = json.loads(storage.read_bytes(path))
    except ValueError:
        listed = _new_list(whole, ray_version)
    else:
        both = zip(listed["checkpoint_results"], listed["checkpoint_report_indices"], strict=True)
        there = [(result, index) for result, index in both if result["checkpoint_dir_name"] in whole]
        if len(there) == len(listed["checkpoint_results"]):
            return
        listed["checkpoint_results"] = [result for result, _ in there]
        listed["checkpoint_report_indices"] = [index for _, index in there]
        listed["latest_checkpoint_result"] = there[-1][0] if there else None
    storage.write_bytes(path, json.dumps(listed).encode())


def _new_list(names: list[str], ray_version: str) -> dict[str, Any]:
    results = [
        {"version": 0, "checkpoint_dir_name": name, "metrics": {"step": int(name.rpartition("_")[2])}} for name in names
    ]
    return {
        "version": 0,
        "ray_version": ray_version,
        "checkpoint_results": results,
        "checkpoint_report_indices": list(range(len(results))),
        "latest_checkpoint_result": results[-1] if results else None,
        "pending_training_results": [],
        "pending_validation_specs": [],
        "current_report_index": len(results),
        "validated_checkpoint_dir_names": [],
        "timed_out_validation_checkpoint_dir_names": [],
        "failed_validation_checkpoint_dir_names": [],
    }


def is_no_room(error: BaseException) -> bool:
    """Whether a disk, a quota or the greatest size of a file has set an end to writing. Libraries hide the number."""
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return getattr(error, "errno", None) in numbers or any(os.strerror(number) in str(error) for number in numbers)


def no_room(folder: str, error: BaseException) -> InputError:
    """What to tell the user where ``is_no_room(error)``; ``folder`` could not be written."""
    remedy = "Make room there, then run the same command again: it goes on from the checkpoint before."
    return InputError("checkpoint", f"no room for {folder}: {' '.join(str(error).split())[:200]}", remedy)


def load(folder: str | Path) -> dict[str, Any]:
    """Inverse of ``save``; tensors are on the CPU.

    Raises:
        InputError: no finished checkpoint, one of a newer version, or one whose two files do not belong together.
    """
    folder = Path(folder)
    remedy = "Remove this folder, so that the run goes on from the checkpoint before it, or start one of another name."
    try:
        data = json.loads((folder / STATE).read_text())
        version = data["format"]
        tensors = load_file(folder / TENSORS)
    except Exception as error:  # the reader of safetensors raises a type of its own
        raise InputError("checkpoint", f"{folder} is unreadable ({error!r})", remedy) from error
    if version > FORMAT_VERSION:
        value = f"{folder} has format {version}, this program reads up to {FORMAT_VERSION}"
        raise InputError("checkpoint", value, "Upgrade boxinst.")
    names = set(tensors)
    try:
        state = _decode(data["state"], tensors)
    except KeyError as error:
        raise InputError("checkpoint", f"{folder} lacks the tensor {error}", remedy) from error
    if tensors:
        raise InputError("checkpoint", f"{folder} holds {len(tensors)} of {len(names)} tensors too many", remedy)
    return dict(state)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every field whose value differs between two nested configs, as (dotted name, old, new); None where absent."""
    for key in [*old, *(k for k in new if k not in old)]:
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from differences(before, after, f"{prefix}{key}.")
        elif before != after:
            yield f"{prefix}{key}", before, after


def _encode(node: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """``node`` as JSON values; its tensors go into ``tensors`` under their path."""
    if isinstance(node, Tensor):
        # A copy: safetensors refuses two names for one memory, and the run goes on while the file is uploaded.
        tensors[name] = node.detach().cpu().clone().contiguous()
        return {_TENSOR: name}
    if isinstance(node, Mapping):
        if all(isinstance(key, str) for key in node):
            return {key: _encode(value, f"{name}/{key}", tensors) for key, value in node.items()}
        return {_ITEMS: [[key, _encode(value, f"{name}/{key}", tensors)] for key, value in node.items()]}
    if isinstance(node, list | tuple):
        return [_encode(value, f"{name}/{index}", tensors) for index, value in enumerate(node)]
    if node is None or isinstance(node, bool | int | float | str):
        return node
    raise TypeError(f"{name}: a checkpoint holds tensors, numbers and text, not {type(node).__name__}")


def _decode(node: Any, tensors: dict[str, Tensor]) -> Any:
    """Inverse of ``_encode``; takes what it uses out of ``tensors``."""
    if isinstance(node, dict):
        if _TENSOR in node:
            return tensors.pop(node[_TENSOR])
        if _ITEMS in node:
            return {key: _decode(value, tensors) for key, value in node[_ITEMS]}
        return {key: _decode(value, tensors) for key, value in node.items()}
    if isinstance(node, list):
        return [_decode(value, tensors) for value in node]
    return node
