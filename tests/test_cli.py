"""The console script and the options it derives: help, statuses, recipes below options, errors with a remedy."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Literal

import pyarrow as pa
import pytest
from commands import ask_boxinst

from boxinst.errors import InputError
from jobs import cli, options


@dataclass(frozen=True)
class Model:
    """The network."""

    classes: tuple[str, ...] = ()
    """Names of the classes."""
    backbone: Literal["small", "large"] = "small"
    """Size of the network."""
    stretch: tuple[float, float] | None = None
    """Percentiles."""

    def __post_init__(self) -> None:
        if self.backbone == "large" and not self.classes:
            raise InputError("model.classes", self.classes, "A large model needs classes.")


@dataclass
class Train:
    """What to train."""

    shards: str
    """Where the shards are."""
    model: Model = field(default_factory=Model)
    steps: int = 100
    """Number of steps."""
    rate: float = 0.5
    """Learning rate."""
    detect: bool = True
    """Whether to detect."""


def parse(*words: str) -> Train:
    return options.parse(Train, words, command="train", about="Trains something small.\n\n  boxinst train --shards s")


@pytest.fixture
def recipe(tmp_path: Path):
    """Writes a recipe and returns its path."""

    def write(text: str) -> str:
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_options_become_the_config() -> None:
    words = ["--shards", "s", "--steps", "7", "--rate", "1e-3", "--no-detect"]
    words += ["--model.stretch", "1", "99", "--model.classes", "a", "b"]
    model = Model(classes=("a", "b"), stretch=(1.0, 99.0))
    assert parse(*words) == Train("s", model, steps=7, rate=1e-3, detect=False)


def test_defaults_are_those_of_the_dataclass() -> None:
    assert parse("--shards", "s") == Train("s")


def test_recipe_sets_defaults_and_options_override(recipe) -> None:
    text = (
        "train:\n  shards: s\n  steps: 7\n  rate: 1e-3\n  model: {backbone: large, classes: [a], stretch: [0.5, 99]}\n"
    )
    path = recipe(text + "evaluate: {}\n")
    model = Model(("a",), "large", (0.5, 99.0))
    assert parse("--recipe", path) == Train("s", model, steps=7, rate=1e-3)
    assert parse(f"--recipe={path}", "--steps", "9", "--model.classes", "b") == Train(
        "s", Model(("b",), "large", (0.5, 99.0)), steps=9, rate=1e-3
    )


def test_recipe_without_the_section_changes_nothing(recipe) -> None:
    assert parse("--shards", "s", "--recipe", recipe("shard: {}\n")) == Train("s")
    assert parse("--shards", "s", "--recipe", recipe("")) == Train("s")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: {stepz: 7}", ["train", "'stepz'", "'steps'"]),
        ("train: {model: {backbon: large}}", ["train.model", "'backbon'", "'backbone'"]),
        ("trian: {steps: 7}", ["'trian'", "'train'"]),
        ("train: {steps: many}", ["train.steps", "'many'", "int"]),
        ("train: {steps: 1.5}", ["train.steps", "1.5", "int"]),
        ("train: {steps: true}", ["train.steps", "True", "int"]),
        ("train: {rate: fast}", ["train.rate", "'fast'", "float"]),
        ("train: {detect: 1}", ["train.detect", "1", "bool"]),
        ("train: {model: {classes: cell}}", ["train.model.classes", "'cell'", "tuple"]),
        ("train: {model: {backbone: huge}}", ["train.model.backbone", "'huge'", "small", "large"]),
        ("train: {model: {stretch: [1]}}", ["train.model.stretch", "[1]", "float"]),
        ("train: {model: large}", ["train.model", "'large'", "name: value"]),
        ("train: 7", ["train", "7", "name: value"]),
        ("[1, 2]", ["list", "sections"]),
        ("train: {steps: ", ["not YAML", "Correct"]),
    ],
)
def test_wrong_recipe_is_named_with_file_key_value_and_remedy(text: str, words: list[str], recipe) -> None:
    path = recipe(text)
    with pytest.raises(InputError) as error:
        parse("--shards", "s", "--recipe", path)
    for word in [path, *words]:
        assert word in str(error.value)


def test_unknown_recipe_suggests_the_closest() -> None:
    with pytest.raises(InputError, match=r"nuclie.*Did you mean 'nuclei'"):
        parse("--recipe", "nuclie")
    with pytest.raises(InputError, match="--recipe: without a name"):
        parse("--recipe", "--shards")


def test_validation_of_the_whole_names_item_value_and_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        parse("--shards", "s", "--model.backbone", "large")
    assert exit.value.code == 2
    shown = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "model.classes: (). A large model needs classes." in shown


def test_help_shows_docstrings_and_the_recipe_as_defaults(recipe, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        parse("--recipe", recipe("train: {steps: 77}"), "--help")
    assert exit.value.code == 0
    shown = capsys.readouterr().out
    for word in (
        "Trains something small",
        "  boxinst train --shards s",
        "Learning rate",
        "--model.backbone",
        "77",
        "--recipe",
        "nuclei",
    ):
        assert word in shown


def test_unknown_option_ends_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        parse("--shards", "s", "--stepz", "7")
    assert exit.value.code == 2
    assert "--stepz" in capsys.readouterr().err


def test_help_is_fast_and_names_every_command() -> None:
    code = "import sys; from jobs import cli; cli.main(['--help']); print(sorted(sys.modules))"
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert time.monotonic() - begin < 2
    assert all(f"\n  {name} " in done.stdout for name in cli.COMMANDS)
    loaded = done.stdout.splitlines()[-1]
    assert not any(f"'{heavy}'" in loaded for heavy in ("torch", "ray", "mlflow", "fiftyone", "numpy"))


def test_no_command_waits_for_heavy_libraries_before_it_has_read_its_options() -> None:
    code = "import importlib, sys; from jobs import cli\n"
    code += "for name in cli.COMMANDS: importlib.import_module(cli.module(name))\n"
    code += "print(sorted(set(sys.modules) & {'torch', 'ray', 'mlflow', 'fiftyone'}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_command_and_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "usage: boxinst" in capsys.readouterr().out
    assert cli.main(["trian"]) == 2
    assert "Did you mean 'train'" in capsys.readouterr().err
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("boxinst 0.")


@pytest.mark.parametrize(
    ("raised", "status", "words"),
    [
        (InputError("--shards", "nowhere", "Give a folder."), 2, "boxinst train: --shards: nowhere. Give a folder."),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_become_words_and_statuses(
    raised: BaseException,
    status: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def main(argv: list[str]) -> int:
        raise raised

    command = ModuleType("jobs.train")
    command.main = main  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "jobs.train", command)
    assert cli.main(["train"]) == status
    shown = capsys.readouterr().err
    assert words in shown
    assert "Traceback" not in shown


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    command = ModuleType("jobs.train")
    command.main = lambda argv: 1 / 0  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "jobs.train", command)
    with pytest.raises(ZeroDivisionError):
        cli.main(["train"])


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_command_runs_as_a_module_and_explains_itself(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", cli.module(name), "--help"],
        capture_output=True,
        text=True,
        env=os.environ | {"BOXINST_HOME": str(tmp_path / "home")},
    )
    assert done.returncode == 0, done.stderr
    assert f"usage: boxinst {name}" in done.stdout
    assert ("--recipe NAME|FILE" in done.stdout) == (name in options.SECTIONS)
    about = (importlib.import_module(cli.module(name)).__doc__ or "").splitlines()
    examples = {line.strip() for line in about if line.lstrip().startswith(f"boxinst {name}")}
    assert examples
    assert examples <= {line.strip() for line in done.stdout.splitlines()}, "each example on a line of its own"
    assert not (tmp_path / "home").exists(), "--help must not leave anything behind"


def test_a_refused_promotion_says_so_and_ends_with_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from jobs import promote
    from pipelines.registry import PromoteResult, Version

    result = PromoteResult(False, Version("cells", 2), Version("cells", 1), "the table")
    monkeypatch.setattr(promote, "decide", lambda config: result)
    assert cli.main(["promote", "--name", "cells", "--shards", "s"]) == 1
    shown = capsys.readouterr().out
    assert "the table" in shown
    assert "Refused: cells/2 is worse than the champion, which stays" in shown


def test_a_promotion_needs_shards_to_measure_on(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(["promote", "--name", "cells"])
    assert exit.value.code == 2
    assert "--shards: not given" in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_figures_are_shown_beside_their_baselines() -> None:
    from jobs.evaluate import table

    figures = {"mask_iou": 0.9, "mask_ap": 0.7, "filled_box_mask_iou": 0.5, "filled_box_mask_ap": 0.2, "box_iou": 0.99}
    head, ours, box, rest = table(figures).splitlines()
    assert "mask AP50" in head
    assert ours.split()[-4:] == ["0.9000", "0.7000", "-", "-"]
    assert box.split()[:4] == ["filled", "box", "0.5000", "0.2000"]
    assert rest.split() == ["box_iou", "0.9900"]
    assert table({"box_iou": 0.99}).split() == ["box_iou", "0.9900"], "without masks there are no baselines to show"


# Storage is looked at before any cluster.

GONE = "s3://no-such-bucket"


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's, with an experiment and a model "gone", whose bucket has been removed since."""
    from mlflow import MlflowClient

    file = tmp_path_factory.mktemp("gone") / "mlflow.db"
    api = MlflowClient(tracking_uri=f"sqlite:///{file}")
    api.create_experiment("gone", artifact_location=f"{GONE}/mlartifacts")
    api.create_registered_model("gone")
    for _ in range(2):
        api.create_model_version("gone", f"{GONE}/mlartifacts/model")
    api.set_registered_model_alias("gone", "champion", "1")
    return file


@pytest.mark.parametrize(
    ("words", "store"),
    [
        (["shard", "--annotations", f"{GONE}/a.json", "--images", "HERE", "--out", "HERE/out"], ""),
        (["shard", "--annotations", "HERE", "--images", f"{GONE}/images", "--out", "HERE/out"], ""),
        (["shard", "--annotations", "HERE", "--images", "HERE", "--out", f"{GONE}/out"], ""),
        (["train", "--shards", f"{GONE}/shards", "--steps", "1"], ""),
        (["train", "--shards", "HERE/shards", "--val", f"{GONE}/val", "--steps", "1"], ""),
        (["train", "--shards", "HERE/shards", "--steps", "1"], GONE),
        (["train", "--shards", "HERE/shards", "--steps", "1", "--init", "models:/gone/1"], ""),
        (["train", "--shards", "HERE/shards", "--steps", "1", "--name", "gone"], ""),  # its experiment's artifacts
        (["evaluate", "--model", f"{GONE}/model", "--shards", "HERE/shards"], ""),
        (["evaluate", "--model", "HERE", "--shards", f"{GONE}/shards"], ""),
        (["evaluate", "--model", "models:/gone/1", "--shards", "HERE/shards"], ""),
        (["segment", "--model", "HERE", "--shards", f"{GONE}/shards"], ""),
        (["segment", "--model", "HERE", "--shards", "HERE/shards", "--out", f"{GONE}/out"], ""),
        (["segment", "--model", "HERE", "--shards", "HERE/shards", "--coco", f"{GONE}/results.json"], ""),
        (["segment", "--model", "HERE", "--shards", "HERE/shards"], GONE),
        (["segment", "--model", "models:/gone@champion", "--shards", "HERE/shards"], ""),
        (["plan", "segment", "--model", "HERE", "--shards", "HERE/shards", "--out", f"{GONE}/out"], ""),
        (["plan", "segment", "--model", "HERE", "--shards", "HERE/shards", "--coco", f"{GONE}/results.json"], ""),
        (["plan", "segment", "--model", "models:/gone@champion", "--shards", "HERE/shards"], ""),
        (["plan", "train", "--shards", f"{GONE}/shards", "--steps", "1"], ""),
        (["plan", "train", "--shards", "HERE/shards", "--steps", "1"], GONE),
        (["plan", "train", "--shards", "HERE/shards", "--steps", "1", "--name", "gone"], ""),
        (["promote", "--name", "gone", "--shards", f"{GONE}/shards"], ""),
        (["promote", "--name", "gone", "--shards", "HERE/shards"], ""),  # the candidate is lost
        (["review", "--masks", f"{GONE}/masks", "--shards", "HERE/shards"], ""),
        (["review", "--masks", "HERE", "--shards", f"{GONE}/shards"], ""),
        (["feedback", "--out", f"{GONE}/next.json"], ""),
        (["feedback", "--out", "HERE/next.json", "--shards", f"{GONE}/shards"], ""),
        (["import", "HERE/model.pth", "--from", "mmdet", "--out", f"{GONE}/model"], ""),
        (["demo"], GONE),
        (["demo", "--corpus", f"{GONE}/corpus"], ""),
        (["demo", "--name", "gone"], ""),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_a_bucket_that_does_not_exist_is_named_before_any_cluster_work(
    words: list[str],
    store: str,
    database: Path,
    s3: str,
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from pipelines import cluster, storage
    from pipelines.schema import SHARD_SCHEMA, Category, Manifest

    monkeypatch.setenv("BOXINST_STORE", store)
    monkeypatch.setattr(cluster, "start", lambda **_: pytest.fail("work on the cluster has begun"))
    if "gone" in " ".join(words):
        home.mkdir()
        shutil.copy(database, home / "mlflow.db")
    row = {"image_id": 1, "file_name": "a.png", "image": b"", "width": 4, "height": 4, "labels": [0]}
    row |= {"annotation_ids": [1], "boxes": [[0.0, 0.0, 2.0, 2.0]], "masks": [None], "crowd": [False]}
    out = str(tmp_path / "shards")
    file = storage.write_parquet(f"{out}/a.parquet", [pa.Table.from_pylist([row], SHARD_SCHEMA)], SHARD_SCHEMA)
    storage.write_manifest(out, Manifest("shards", [Category(1, "a")], [file], {"images": 1, "boxes": 1}))
    words = [word.replace("HERE", str(tmp_path)) for word in words]
    with pytest.raises(InputError, match=f"^{GONE}: no such bucket at http://127"):
        importlib.import_module(cli.module(words[0])).main(words[1:])
    assert not (home / "demo").exists(), "nor is a corpus drawn"


def examples(text: str) -> list[str]:
    """The whole command lines of a help text, without what is said beside them."""
    lines = (line.strip() for line in text.replace("\\\n", " ").splitlines() if re.match(r" *boxinst [a-z]", line))
    said = (re.split(r"\s{3,}(?![\s-])", line)[0] for line in lines)
    return [line for line in said if "..." not in line and "[" not in line]


@pytest.mark.parametrize("command", ["", *cli.COMMANDS])
def test_every_example_of_help_is_a_command(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://HOST:8265")
    text = importlib.import_module(cli.module(command)).__doc__ if command else cli.HELP
    found = examples(str(text))
    assert found
    for line in found:
        ask_boxinst(shlex.split(line), monkeypatch)
