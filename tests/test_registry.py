"""Registered models in a real MLflow on SQLite: found by every kind of address, served, promoted and rolled back."""

from __future__ import annotations

import base64
import io
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import boxinst
from boxinst import InputError, rle
from pipelines import promotion, registry, storage
from pipelines.promotion import PromoteConfig, Promotion
from pipelines.schema import Category
from pipelines.tracking import Run


@dataclass
class World:
    """A home with three versions of one model."""

    home: Path
    run: Run
    versions: list[registry.Version]
    folder: Path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_model: str) -> Iterator[World]:
    home = tmp_path_factory.mktemp("registry")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BOXINST_HOME", str(home))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        run = Run.start("train", experiment="e")
        figures = {"mask_iou": 0.5}
        versions = [
            registry.register(run.run_id, tiny_model, "shapes", metrics=figures, tags={"k": str(k)}) for k in range(3)
        ]
        yield World(home, run, versions, Path(tiny_model))


@pytest.fixture
def name(world: World) -> str:
    """A registered model of this test alone, with four versions that share the files of ``world``'s first."""
    api = registry.client()
    name = f"m{random.Random(os.urandom(8)).getrandbits(40)}"
    source = api.get_model_version("shapes", "1").source
    api.create_registered_model(name)
    with registry._mlflow_globals():
        for _ in range(4):
            api.create_model_version(name, source, world.run.run_id)
    return name


# Finding


def test_every_address_leads_to_the_same_weights(world: World, tmp_path: Path) -> None:
    registry.client().set_registered_model_alias("shapes", "best", "2")
    logged = registry.client().get_model_version_download_uri("shapes", "1").removeprefix("file://")
    copied = tmp_path / "copied"
    shutil.copytree(world.folder, copied)
    addresses = [
        "models:/shapes/1",
        "models:/shapes/latest",
        "models:/shapes@best",
        f"runs:/{world.run.run_id}",
        f"runs:/{world.run.run_id}/model",
        str(copied),
        f"{copied}/",
        logged,  # the folder that MLflow wrote
    ]
    wanted = registry.fingerprint(world.folder)
    for address in addresses:
        folder = registry.resolve(address)
        assert registry.fingerprint(folder) == wanted, address
        boxinst.load(folder)


def test_labels(world: World) -> None:
    assert registry.identify("models:/shapes/2") == "shapes/2"
    assert registry.identify("models:/shapes/latest") == "shapes/3"
    assert registry.identify(f"runs:/{world.run.run_id}").startswith("shapes/")
    assert registry.identify("s3://bucket/models/mine/") == "mine"


@pytest.mark.parametrize(
    ("address", "item", "remedy"),
    [
        ("models:/shapez/1", "models:/shapez/1", "there is: .*shapes"),
        ("models:/shapes/99", "models:/shapes/99", "no version 99; there is: 1, 2, 3"),
        ("models:/shapes@nobody", "models:/shapes@nobody", "no alias nobody.*boxinst promote"),
        ("models:/shapes", "models:/shapes", "Write models:/NAME@ALIAS or models:/NAME/VERSION"),
        ("runs:/feedbeef", "runs:/feedbeef", "no such run"),
        ("/no/such/folder", "/no/such/folder", "no such folder"),
        ("ftp://host/model", "ftp://host/model", "s3:// or a folder"),
    ],
)
def test_an_address_that_leads_nowhere(world: World, address: str, item: str, remedy: str) -> None:
    with pytest.raises(InputError, match=remedy) as caught:
        registry.resolve(address)
    assert item in str(caught.value)


def test_a_folder_that_is_no_model(world: World, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no config\.json and no model\.safetensors: give a folder"):
        registry.resolve(str(tmp_path))


def test_a_run_without_a_model(world: World) -> None:
    run = Run.start("empty", experiment="e")
    with pytest.raises(InputError, match="has logged no model"):
        registry.resolve(f"runs:/{run.run_id}")


def test_a_model_on_s3_is_downloaded_once_and_again_when_it_changes(world: World, s3: str) -> None:
    for file in world.folder.iterdir():
        storage.write_bytes(f"{s3}/models/mine/{file.name}", file.read_bytes())
    first = registry.resolve(f"{s3}/models/mine")
    assert world.home / "cache" in first.parents
    assert registry.fingerprint(first) == registry.fingerprint(world.folder)
    written = (first / "model.safetensors").stat().st_mtime_ns
    assert registry.resolve(f"{s3}/models/mine/") == first
    assert (first / "model.safetensors").stat().st_mtime_ns == written

    config = json.loads((world.folder / "config.json").read_text())
    storage.write_bytes(f"{s3}/models/mine/config.json", json.dumps(config).encode())
    assert registry.resolve(f"{s3}/models/mine") != first
    with pytest.raises(InputError, match="does not exist"):
        registry.resolve(f"{s3}/models/other")


def test_what_is_said_of_files_out_of_reach_holds_no_password(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://ada:hunter2@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(
        InputError, match=r"model: models:/m/1\. It cannot be read \(.* http://127\.0\.0\.1:9/"
    ) as caught:
        registry._fetch("mlflow-artifacts:/1/models/m-1/artifacts", "models:/m/1")
    assert "hunter2" not in str(caught.value)


def test_class_lists_must_agree_in_order() -> None:
    categories = [Category(7, "cell"), Category(3, "nucleus")]
    registry.check_classes(("cell", "nucleus"), categories, model="m", shards="s")
    for classes in (("nucleus", "cell"), ("cell",), ()):
        with pytest.raises(InputError, match=r"model: m has the classes .* s has cell, nucleus: give a model"):
            registry.check_classes(classes, categories, model="m", shards="s")


# Registering


def test_a_registered_model_holds_nothing_that_runs_on_reading(world: World) -> None:
    logged = Path(registry.client().get_model_version_download_uri("shapes", "1").removeprefix("file://"))
    names = [p.name for p in logged.rglob("*") if p.is_file()]
    assert "pyfunc_model.py" in names
    assert not [n for n in names if n.endswith((".pkl", ".pickle", ".pt", ".pth", ".bin"))]


def test_registering_leaves_the_run_and_the_process_as_they_were(world: World) -> None:
    api = registry.client()
    assert api.get_run(world.run.run_id).info.status == "RUNNING"
    assert "MLFLOW_TRACKING_URI" not in os.environ
    version = api.get_model_version("shapes", "2")
    assert (version.run_id, version.tags) == (world.run.run_id, {"k": "1"})
    assert [v.version for v in world.versions] == [1, 2, 3]
    assert world.versions[1].uri == "models:/shapes/2"


def test_the_version_that_a_run_was_registered_as(world: World, name: str) -> None:
    assert registry.registered(world.run.run_id, "shapes") == registry.Version("shapes", 3)
    assert registry.registered(world.run.run_id, name) == registry.Version(name, 4)
    assert registry.registered("0" * 32, "shapes") is None
    assert registry.registered(world.run.run_id, "shapez") is None


def test_a_bad_model_name_is_refused() -> None:
    for bad in ("a/b", "a:b", "a@b", "", " a"):
        with pytest.raises(InputError, match=r"name: .* letters, digits"):
            registry.register("run", "folder", bad)


@pytest.fixture(scope="module")
def served(world: World) -> mlflow.pyfunc.PyFuncModel:
    with registry._mlflow_globals():
        return mlflow.pyfunc.load_model("models:/shapes/1")


def _png(seed: int, height: int, width: int) -> tuple[bytes, torch.Tensor]:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue(), torch.from_numpy(pixels).permute(2, 0, 1)


def test_served_masks_are_those_of_the_model(world: World, served: mlflow.pyfunc.PyFuncModel) -> None:
    (data, pixels), (other, _) = _png(0, 40, 56), _png(1, 33, 20)
    boxes = [[3, 4, 20, 30], [10.5, 2.0, 50.0, 39.0]]
    (wanted,) = boxinst.load(world.folder).segment([pixels], [torch.tensor(boxes)])
    answer = served.predict(
        pd.DataFrame(
            {
                "image": [data, base64.b64encode(data).decode(), other],
                "boxes": [boxes, boxes, []],
            }
        )
    )
    for row in (0, 1):
        masks = answer["masks"][row]
        assert [m["size"] for m in masks] == [[40, 56]] * 2
        found = rle.decode([m["counts"].encode() for m in masks], 40, 56)
        assert torch.equal(found, wanted.masks)
        assert answer["scores"][row] == pytest.approx(wanted.scores.tolist(), abs=1e-6)
    assert answer["masks"][2] == []
    assert answer["scores"][2] == []


def test_the_server_answers_json(served: mlflow.pyfunc.PyFuncModel) -> None:
    from fastapi.testclient import TestClient
    from mlflow.pyfunc.scoring_server import init

    data, _ = _png(0, 40, 56)
    record = {"image": base64.b64encode(data).decode(), "boxes": [[3, 4, 20, 30]]}
    response = TestClient(init(served)).post("/invocations", json={"dataframe_records": [record]})
    (row,) = response.json()["predictions"]
    assert row["masks"][0]["size"] == [40, 56]
    assert len(row["scores"]) == 1


def test_a_registered_model_brings_its_own_code(world: World, tmp_path: Path) -> None:
    """Loaded by a process that stands elsewhere, it runs the code it was logged with."""
    folder = registry.client().get_model_version_download_uri("shapes", "1").removeprefix("file://")
    elsewhere = tmp_path / "moved"
    shutil.copytree(folder, elsewhere)
    script = (
        "import mlflow, sys; m = mlflow.pyfunc.load_model(sys.argv[1]); import boxinst, pipelines.images as i;"
        "print(boxinst.__file__); print(i.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(elsewhere)], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert all(line.startswith(str(elsewhere)) for line in done.stdout.split()[-2:]), done.stdout


# Promoting


def test_the_first_champion_needs_only_sane_figures(name: str) -> None:
    config = PromoteConfig(name, "1", by="ada", reason="first")
    for bad in (0.0, float("nan")):
        refused = registry.promote(config, {"mask_iou": bad, "mask_ap": 0.1}, None)
        assert not refused.promoted
        assert "worse" in refused.table
    assert registry.contenders(config)[1] is None
    result = registry.promote(config, {"mask_iou": 0.8, "mask_ap": 0.6}, None, evaluated_on="val abc")
    assert result.promoted
    assert registry.find(f"models:/{name}@champion").version == 1
    (move,) = registry.history(name)
    assert (move.action, move.version, move.previous, move.by, move.reason) == ("promote", 1, None, "ada", "first")
    assert move.metrics == {"mask_iou": 0.8, "mask_ap": 0.6}
    assert move.evaluated_on == "val abc"


def test_a_worse_candidate_is_refused_with_a_table(name: str) -> None:
    registry.promote(PromoteConfig(name, "1"), {"mask_iou": 0.8, "mask_ap": 0.6}, None)
    champion = {"mask_iou": 0.8, "mask_ap": 0.6, "spill": 0.1}
    worse = {"mask_iou": 0.9, "mask_ap": 0.59, "spill": 0.3}
    result = registry.promote(PromoteConfig(name, tolerance=0.005), worse, champion)
    assert not result.promoted
    assert registry.find(f"models:/{name}@champion").version == 1
    assert len(registry.history(name)) == 1
    lines = result.table.splitlines()
    assert [line.split()[-1] for line in lines[1:]] == ["ok", "worse"]
    assert "0.5900" in lines[2]
    assert "-0.0100" in lines[2]
    # Less is better, and within the tolerance is well enough.
    assert not registry.promote(PromoteConfig(name, lower=("spill",)), worse, champion).promoted
    assert registry.promote(PromoteConfig(name, tolerance=0.02), worse, champion).promoted
    assert registry.find(f"models:/{name}@champion").version == 4


def test_rollback_walks_back_and_ends_with_an_error(name: str) -> None:
    figures = {"mask_iou": 0.8}
    for version in (1, 2, 1, 3):
        registry.promote(PromoteConfig(name, str(version)), figures, figures)
    back = PromoteConfig(name, rollback=True, reason="bad masks")
    seen = []
    for _ in range(3):
        result = registry.rollback(back)
        assert result.promoted
        seen.append(registry.find(f"models:/{name}@champion").version)
    assert seen == [1, 2, 1]
    with pytest.raises(InputError, match=r"rollback: .*version 1 is the first champion.*nothing to go back to"):
        registry.rollback(back)
    assert [move.action for move in registry.history(name)] == ["promote"] * 4 + ["rollback"] * 3
    registry.promote(PromoteConfig(name, "4"), figures, figures)
    assert registry.rollback(back).version.version == 1


def test_rollback_passes_over_versions_that_are_gone(name: str) -> None:
    figures = {"mask_iou": 0.8}
    for version in (1, 2, 3):
        registry.promote(PromoteConfig(name, str(version)), figures, figures)
    registry.client().delete_model_version(name, "2")
    assert registry.rollback(PromoteConfig(name)).version.version == 1


def test_rollback_without_a_champion(name: str) -> None:
    with pytest.raises(InputError, match="no champion yet"):
        registry.rollback(PromoteConfig(name))


def test_what_cannot_be_promoted(name: str, world: World) -> None:
    figures = {"mask_iou": 0.8}
    with pytest.raises(InputError, match=r"candidate: models:/shapes/1\. It is a version of shapes, not of"):
        registry.promote(PromoteConfig(name, "models:/shapes/1"), figures, None)
    with pytest.raises(InputError, match="no version 9"):
        registry.promote(PromoteConfig(name, "9"), figures, None)
    with pytest.raises(InputError, match=r"gated metric: mask_iuo\. It was not measured; gate on some of: mask_iou"):
        registry.promote(PromoteConfig(name, "1", higher=("mask_iuo",)), figures, None)
    registry.promote(PromoteConfig(name, "1"), figures, None)
    with pytest.raises(InputError, match="is the champion already"):
        registry.promote(PromoteConfig(name, "1"), figures, figures)
    with pytest.raises(InputError, match="Evaluate both models on the same set"):
        registry.promote(PromoteConfig(name, "2"), figures, {"box_iou": 0.5})
    with pytest.raises(InputError, match="evaluate it on the same set"):
        registry.promote(PromoteConfig(name, "2"), figures, None)


@pytest.mark.parametrize(
    ("options", "item"),
    [
        ({"tolerance": -1.0}, "tolerance"),
        ({"alias": "v3"}, "alias"),
        ({"alias": "latest"}, "alias"),
        ({"higher": ("a",), "lower": ("a",)}, "higher, lower"),
    ],
)
def test_bad_options_of_promote(options: dict[str, object], item: str) -> None:
    with pytest.raises(InputError) as caught:
        replace(PromoteConfig("m"), **options)  # type: ignore[arg-type]
    assert caught.value.item == item


def test_usual_gates_follow_what_was_measured() -> None:
    def gated(measured: dict[str, float]) -> list[str]:
        return [limit.metric for limit in promotion.limits((), (), 0.0, measured, None)]

    everything = dict.fromkeys(("mask_iou", "mask_ap", "box_iou", "box_ap", "spill"), 0.5)
    assert gated(everything) == ["mask_iou", "mask_ap"]
    assert gated({"mask_ap": 0.5, "box_ap": 0.5}) == ["mask_ap"]
    assert gated({"box_iou": 0.5, "spill": 0.1}) == ["box_iou"]
    assert gated({"box_ap": 0.5}) == ["box_ap"]


def test_replay_agrees_with_a_stack() -> None:
    """Any sequence of promotions and rollbacks leaves the pile that a plain stack would hold."""
    rng = random.Random(3)
    for _ in range(200):
        stack: list[int] = []
        moves: list[Promotion] = []
        for step in range(rng.randint(1, 15)):
            back = len(stack) > 1 and rng.random() < 0.4
            previous = stack[-1] if stack else None
            if back:
                stack.pop()
            else:
                stack.append(rng.choice([v for v in range(1, 5) if v != previous]))
            action = "rollback" if back else "promote"
            moves.append(Promotion(action, stack[-1], previous, "x", f"{step:03d}", "", {}, ""))
            assert promotion.replay(moves) == stack


def test_replay_knows_of_an_alias_moved_by_hand() -> None:
    moves = [
        Promotion("promote", 1, None, "x", "0", "", {}, ""),
        Promotion("promote", 3, 2, "x", "1", "", {}, ""),
    ]
    assert promotion.replay(moves) == [1, 2, 3]


# A server that is away.


def test_a_registered_model_of_a_server_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:hunter2@127.0.0.1:9")
    for ask in (
        lambda: registry.resolve("models:/shapes/1"),
        lambda: registry.resolve("runs:/1a2b"),
        lambda: registry.rollback(PromoteConfig("shapes")),
    ):
        with pytest.raises(InputError, match=r"MLflow: nobody answers at .*127\.0\.0\.1:9.*Start the MLflow") as e:
            ask()
        assert "hunter2" not in str(e.value)
