"""pipelines.checkpoint: what is saved comes back exactly, and what is damaged is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.fs as pafs
import pytest
import torch

from boxinst.errors import InputError
from pipelines import checkpoint


def trained() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A small network whose optimiser has a state."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    step(model, optimizer)
    return model, optimizer


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    images = torch.arange(3 * 64, dtype=torch.float32).view(1, 3, 8, 8)
    model(images).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_a_nested_state_comes_back_exactly(tmp_path: Path) -> None:
    shared = torch.randn(3)
    state = {
        "step": 7,
        "third": 1 / 3,
        "none": None,
        "flag": True,
        "text": "é",
        "nested": {"list": [1, {"t": torch.tensor(2)}], "ints": {0: torch.ones(2, dtype=torch.bfloat16), 5: 1.5}},
        "random": torch.random.get_rng_state(),
        "twice": [shared, shared],
        "view": torch.arange(6).view(2, 3).T,
        "empty": torch.zeros(0, 4),
        "tuple": (0.9, 0.999),
    }
    checkpoint.save(tmp_path / "c", state)
    back = checkpoint.load(tmp_path / "c")
    assert back["tuple"] == [0.9, 0.999]
    plain = ("step", "third", "none", "flag", "text")
    assert [back[k] for k in plain] == [state[k] for k in plain]
    assert back["nested"]["ints"][5] == 1.5
    assert back["nested"]["list"][1]["t"].ndim == 0
    for before, after in (
        (state["nested"]["ints"][0], back["nested"]["ints"][0]),  # type: ignore[index]
        (state["random"], back["random"]),
        (shared, back["twice"][1]),
        (state["view"], back["view"]),
        (state["empty"], back["empty"]),
    ):
        assert before.dtype == after.dtype  # type: ignore[union-attr]
        assert torch.equal(before, after)  # type: ignore[arg-type]


def test_an_optimiser_goes_on_as_if_never_stopped(tmp_path: Path) -> None:
    model, optimizer = trained()
    checkpoint.save(tmp_path, {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    step(model, optimizer)

    other, its_optimizer = trained()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    back = checkpoint.load(tmp_path)
    other.load_state_dict(back["model"])
    its_optimizer.load_state_dict(back["optimizer"])
    step(other, its_optimizer)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_no_pickle_is_written(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, {"a": torch.ones(1)})
    assert {p.name for p in tmp_path.iterdir()} == {checkpoint.TENSORS, checkpoint.STATE}


def test_an_object_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="nested/path"):
        checkpoint.save(tmp_path, {"nested": {"path": Path("x")}})


def damage_json(folder: Path) -> None:
    (folder / checkpoint.STATE).write_text("{")


def forget_json(folder: Path) -> None:
    (folder / checkpoint.STATE).unlink()


def cut_tensors(folder: Path) -> None:
    whole = (folder / checkpoint.TENSORS).read_bytes()
    (folder / checkpoint.TENSORS).write_bytes(whole[:-3])


def other_tensors(folder: Path) -> None:
    checkpoint.save(folder / "other", {"b": torch.ones(1)})
    (folder / "other" / checkpoint.TENSORS).replace(folder / checkpoint.TENSORS)


def more_tensors(folder: Path) -> None:
    checkpoint.save(folder / "other", {"a": torch.ones(2), "b": torch.ones(1)})
    (folder / "other" / checkpoint.TENSORS).replace(folder / checkpoint.TENSORS)


def newer(folder: Path) -> None:
    data = json.loads((folder / checkpoint.STATE).read_text())
    (folder / checkpoint.STATE).write_text(json.dumps(data | {"format": checkpoint.FORMAT_VERSION + 1}))


@pytest.mark.parametrize("spoil", [damage_json, forget_json, cut_tensors, other_tensors, more_tensors, newer])
def test_a_damaged_checkpoint_is_refused(spoil, tmp_path: Path) -> None:
    checkpoint.save(tmp_path, {"a": torch.ones(2)})
    spoil(tmp_path)
    with pytest.raises(InputError) as caught:
        checkpoint.load(tmp_path)
    assert caught.value.item == "checkpoint"
    assert str(tmp_path) in str(caught.value.value)
    assert caught.value.remedy


def test_an_upload_is_whole_or_not_there(tmp_path: Path) -> None:
    fs = pafs.LocalFileSystem()
    checkpoint.save(tmp_path / "c", {"a": torch.ones(2)})
    checkpoint.upload(tmp_path / "c", fs, str(tmp_path / "runs" / "good"))
    assert torch.equal(checkpoint.load(tmp_path / "runs" / "good")["a"], torch.ones(2))
    (tmp_path / "c" / checkpoint.STATE).unlink()
    with pytest.raises(FileNotFoundError):
        checkpoint.upload(tmp_path / "c", fs, str(tmp_path / "runs" / "bad"))
    assert not (tmp_path / "runs" / "bad").exists()


def test_a_list_that_was_cut_short_is_made_anew_from_what_is_whole(tmp_path: Path) -> None:
    run, listed = str(tmp_path), tmp_path / checkpoint.LIST
    checkpoint.mend_list(run, "2.60.0")
    assert not listed.exists()
    for step in (3, 6, 9):
        checkpoint.save(tmp_path / f"checkpoint_{step:08d}", {"step": step})
    (tmp_path / "checkpoint_00000009" / checkpoint.STATE).unlink()
    listed.write_text('{"ray_version": "2.6')
    checkpoint.mend_list(run, "2.60.0")
    from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import _CheckpointManagerState

    read = _CheckpointManagerState.parse_obj(json.loads(listed.read_text()))
    assert [r.checkpoint_dir_name for r in read.checkpoint_results] == ["checkpoint_00000003", "checkpoint_00000006"]
    assert read.latest_checkpoint_result == read.checkpoint_results[1]
    assert (read.checkpoint_report_indices, read.current_report_index) == ([0, 1], 2)
    before = listed.read_text()
    checkpoint.mend_list(run, "2.61.0")
    assert listed.read_text() == before

    shutil.rmtree(tmp_path / "checkpoint_00000006")  # to go on from the one before
    checkpoint.mend_list(run, "2.60.0")
    read = _CheckpointManagerState.parse_obj(json.loads(listed.read_text()))
    assert [r.checkpoint_dir_name for r in read.checkpoint_results] == ["checkpoint_00000003"]
    assert (read.latest_checkpoint_result, read.checkpoint_report_indices) == (read.checkpoint_results[0], [0])


def test_a_full_disk_is_told_from_other_errors(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space") as full, open("/dev/full", "wb", buffering=0) as device:
        device.write(b"x")
    assert checkpoint.is_no_room(full.value)
    limit = (
        f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (9, 9)); checkpoint.save({str(tmp_path)!r}, {{}})"
    )
    code = (
        f"import signal; from pipelines import checkpoint; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\ntry: {limit}"
    )
    code += "\nexcept Exception as error: print(type(error).__name__, checkpoint.is_no_room(error))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.endswith(" True\n")
    assert not checkpoint.is_no_room(PermissionError(13, "Permission denied"))


def test_differences_name_the_field() -> None:
    old = {"a": 1, "model": {"width": 32, "classes": ["x"]}, "gone": 0}
    new = {"a": 1, "model": {"width": 64, "classes": ["x"]}, "added": 2}
    found = list(checkpoint.differences(old, new))
    assert found == [("model.width", 32, 64), ("gone", 0, None), ("added", None, 2)]
    assert list(checkpoint.differences(old, old)) == []
