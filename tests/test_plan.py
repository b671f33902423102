"""A plan's arithmetic, what it measures, and the comparison with the run that follows."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from fault_proxy import FaultProxy

from boxinst.errors import InputError
from jobs import cli
from pipelines import forecast, storage, trial
from pipelines.config import SegmentConfig
from pipelines.feed import ShardIndex, Tally
from pipelines.forecast import Forecast, Outcome, PlanConfig, Trial, Work
from pipelines.schema import SHARD_SCHEMA

TRIED = Trial(
    read_seconds=0.01,
    decode_seconds=0.02,
    network_seconds=0.08,
    memory_bytes=10**9,
    gpu_bytes=0,
    start_seconds=30,
    validation_seconds=0.5,
    output_bytes=200,
)
WORK = Work(
    images=1000,
    boxes=20_000,
    workers=2,
    threads=4,
    data_processes=2,
    decodes_in_worker=True,
    shares_cores=False,
    requests=100,
    bytes=10**8,
    validation_images=40,
    outputs=20_000,
)


def test_the_figures_follow_from_each_other() -> None:
    planned = Forecast("segment", WORK, TRIED, price=3)
    assert planned.rate == pytest.approx(1 / (0.02 + 0.08)), "a worker decodes, then segments"
    assert planned.hours == pytest.approx((1000 / (planned.rate * 2) + 40 * 0.5 / 2) / 3600)
    assert planned.money == pytest.approx(3 * 2 * (planned.hours + 30 / 3600))
    assert planned.money_per_million_boxes == pytest.approx(planned.money * 50)
    assert planned.output_bytes == 20_000 * 200
    shown = dict(planned.rows())
    assert shown["images/s per worker"] == "10.00"
    assert shown["store requests"] == "100, 1.67/s"
    assert shown["storage of masks"] == "4 MB (20,000 × 200 B a mask row)"


def test_a_worker_decodes_while_its_gpu_is_at_work() -> None:
    on_gpu = replace(TRIED, gpu_bytes=1)
    assert Forecast("segment", WORK, on_gpu, 0).rate == pytest.approx(1 / 0.08)
    assert Forecast("segment", WORK, replace(on_gpu, decode_seconds=0.1), 0).rate == pytest.approx(1 / 0.1)


def test_training_gets_its_images_from_other_processes() -> None:
    work = replace(WORK, decodes_in_worker=False)
    assert Forecast("train", work, TRIED, 0).rate == pytest.approx(1 / 0.08), "they have cores of their own"
    shared = Forecast("train", replace(work, shares_cores=True), TRIED, 0)
    assert shared.rate == pytest.approx(1 / (0.08 + 0.02 / 4)), "they take a fourth of the worker's four cores"
    slow = Forecast("train", work, replace(TRIED, decode_seconds=0.19), 0)
    assert slow.rate == pytest.approx(2 / 2 / (0.01 + 0.19)), "the worker waits for them"
    assert slow.data_wait == pytest.approx(1 - 0.08 / 0.2)
    assert Forecast("train", work, TRIED, 0).data_wait == 0


@pytest.mark.parametrize(
    ("in_worker", "changes", "bottleneck"),
    [
        (True, {}, "CPU (the network)"),
        (True, {"gpu_bytes": 1}, "GPU"),
        (True, {"decode_seconds": 0.1}, "decode"),
        (True, {"read_seconds": 1.0}, "store"),
        (False, {"network_seconds": 0.001}, "decode"),
        (False, {"network_seconds": 0.001, "read_seconds": 0.03}, "store"),
    ],
)
def test_the_bottleneck_is_what_takes_longest(in_worker: bool, changes: dict[str, float], bottleneck: str) -> None:
    work = replace(WORK, decodes_in_worker=in_worker)
    assert Forecast("train", work, replace(TRIED, **changes), 0).bottleneck == bottleneck  # type: ignore[arg-type]


def test_a_plan_is_found_by_the_same_command_alone(home: Path) -> None:
    planned = Forecast("segment", WORK, TRIED, 3)
    config = SegmentConfig(model="m", shards="s")
    assert forecast.find("segment", config) is None
    planned.keep(config)
    assert forecast.find("segment", config) == planned
    assert forecast.find("segment", replace(config, workers=2)) is None
    assert forecast.find("train", config) is None


def test_the_comparison_gives_ratios() -> None:
    planned = Forecast("segment", WORK, TRIED, 3)
    expected = planned.seconds + TRIED.start_seconds
    outcome = Outcome(expected * 2, output_bytes=2_000_000, used={"memory": 1.5, "data_wait": 0.25})
    assert ratios(forecast.compare(planned, outcome)) == {
        "hours": "2.00",
        "images/s": "0.50",
        "storage": "0.50",
        "memory": "1.50",
        "data wait": "-",  # none was expected
        "money": "2.00",
        "per million boxes": "2.00",
        "bottleneck": "-",
    }
    free = forecast.compare(replace(planned, price=0), replace(outcome, used={}))
    assert list(ratios(free)) == ["hours", "images/s", "storage"], "what was not measured is not shown"


def ratios(compared: str) -> dict[str, str]:
    """The last column of a comparison, by name."""
    return {line[:20].strip(): line.split()[-1] for line in compared.splitlines()[1:]}


def test_the_comparison_shows_what_was_read_and_what_held_the_run_up() -> None:
    planned = Forecast("train", replace(WORK, decodes_in_worker=False), TRIED, 3)
    used = {"data_wait": 0.02, "store_requests": 150, "store_bytes": 5e7}
    shown = forecast.compare(planned, Outcome(planned.seconds, 0, used))
    assert (ratios(shown)["store requests"], ratios(shown)["store bytes"]) == ("1.50", "0.50")
    money = planned.price * planned.work.workers * planned.seconds / 3600
    million = re.search(r"per million boxes +\S+ +(\S+)", shown)
    assert million is not None
    assert float(million[1]) == pytest.approx(money / planned.work.boxes * 1e6, abs=0.005)
    for more, said in (({}, "CPU"), ({"gpu_memory": 1.0}, "GPU"), ({"data_wait": 0.3}, "store or decode")):
        shown = forecast.compare(planned, Outcome(planned.seconds, 0, used | more))
        assert re.search(r"bottleneck +CPU \(the network\) +(.*?) +-$", shown, re.MULTILINE)[1] == said  # type: ignore[index]


def test_a_sample_is_read_as_the_store_would_be_asked(shards: dict[str, str]) -> None:
    index = ShardIndex.open(shards["train"])
    reading = trial.read(index, 5, SHARD_SCHEMA.names)
    about = pq.ParquetFile(index.groups[0][0]).metadata
    group = about.row_group(0)
    columns = [group.column(k) for k in range(group.num_columns)]
    assert reading.table.num_rows == 5
    assert reading.table.schema.names == SHARD_SCHEMA.names
    assert reading.group_bytes == pytest.approx(sum(c.total_compressed_size for c in columns), rel=0.01)
    assert reading.group == 1, "columns that lie beside each other are read together"
    assert reading.opening == 2, "its size, and its directory"
    assert trial.read(index, 5, ["boxes"]).group_bytes < reading.group_bytes / 2


def test_a_store_gets_the_requests_that_are_counted(shards: dict[str, str], s3: str, s3_proxy: FaultProxy) -> None:
    for file in Path(shards["train"]).iterdir():
        storage.write_bytes(f"{s3}/shards/{file.name}", file.read_bytes())
    index = ShardIndex.open(f"{s3}/shards")
    reading = trial.read(index, 5, SHARD_SCHEMA.names)
    before, tally = len(s3_proxy.keys), Tally()
    index.read(np.arange(4), tally)  # as a training does, within one row group
    assert len(s3_proxy.keys) - before == reading.opening + reading.group == tally.requests
    assert tally.bytes == pytest.approx(reading.group_bytes, rel=0.01)


def rows(shown: str) -> dict[str, str]:
    """The table that a plan prints."""
    return dict(re.findall(r"^  (\S.*?)  +(\S.*)$", shown, re.MULTILINE))


@pytest.mark.long
def test_a_segmentation_is_planned_run_and_compared(
    shards: dict[str, str], tiny_model: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["segment", "--model", tiny_model, "--shards", shards["train"], "--out", str(tmp_path / "masks")]
    assert cli.main(["plan", "--images", "4", "--seconds", "0", "--price", "2", *words]) == 0
    shown = rows(capsys.readouterr().out)
    counts = storage.read_manifest(shards["train"]).counts
    assert shown["images"] == f"12 with {counts['boxes']} boxes"
    assert shown["bottleneck"] in ("CPU (the network)", "decode", "store")
    assert float(shown["images/s per worker"]) > 0
    assert "per million boxes" in shown["money"]
    assert not (tmp_path / "masks").exists(), "a plan does none of the work"
    (kept,) = (home / "plans").iterdir()

    assert cli.main(words) == 0
    came_to = capsys.readouterr().out
    assert "Planned, and what came of it" in came_to
    ratio = float(re.search(r"storage .* (\S+)\n", came_to)[1])  # type: ignore[index]
    assert 0.2 < ratio < 5, "a few thousand bytes, of which a file's directory is a part"
    assert 0.3 < float(re.search(r"memory .* (\S+)\n", came_to)[1]) < 3  # type: ignore[index]
    assert kept.is_file()
    cli.main(words)
    assert "Planned" not in capsys.readouterr().out, "nothing was done this time"


TRAIN = "--model.backbone resnet18 --model.width 16 --model.fpn-channels 16 --model.no-detect --model.mask-stride 4"
TRAIN += " --model.mask-branch-channels 16 --model.mask-branch-layers 1 --augment.crop 64 --precision fp32"
TRAIN += " --batch-size 4 --cpus-per-worker 1 --data-workers 1"


def test_a_training_is_planned(shards: dict[str, str], home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--shards", shards["train"], "--val", shards["val"], "--epochs", "5", *TRAIN.split()]
    words += ["--eval-every", "10", "--checkpoint-every", "4", "--name", "planned"]
    assert cli.main(["plan", "--images", "4", "--seconds", "0", *words]) == 0
    shown = rows(capsys.readouterr().out)
    counts = storage.read_manifest(shards["train"]).counts
    assert shown["images"] == f"60 with {counts['boxes'] * 5} boxes"
    assert shown["storage of checkpoints"].split("(")[1].startswith("2 ×"), "two are kept"
    assert shown["store requests"].startswith("15,"), "2 to open, 1 for the columns: once in each of 5 epochs"
    (kept,) = (home / "plans").iterdir()
    planned = json.loads(kept.read_text())
    assert planned["work"]["validation_images"] == 4 * 2, "after steps 10 and 15"
    assert planned["trial"]["output_bytes"] > 100_000, "weights, their average and the optimiser's moments"
    assert not (home / "runs").exists()


@pytest.mark.long
def test_a_training_shows_what_came_of_its_plan(
    shards: dict[str, str], home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "train",
        "--shards",
        shards["train"],
        "--epochs",
        "2",
        *TRAIN.split(),
        "--no-register",
        "--name",
        "planned",
    ]
    cli.main(["plan", "--images", "4", "--seconds", "0", *words])
    capsys.readouterr()
    assert cli.main(words) == 0
    came_to = capsys.readouterr()
    assert "Planned, and what came of it" in came_to.out
    assert 0.9 < float(re.search(r"storage .* (\S+)\n", came_to.out)[1]) < 1.2  # type: ignore[index]
    assert re.search(r"^  data wait  .*%", came_to.out, re.MULTILINE)
    assert re.search(r"^  store requests +6 +6 +1.00$", came_to.out, re.MULTILINE), "one row group, in two epochs"
    assert re.search(r"^  store bytes .* 1.00$", came_to.out, re.MULTILINE)
    assert re.search(r"^  bottleneck .*(store or decode|CPU) +-$", came_to.out, re.MULTILINE)
    assert "MLflow run: " in came_to.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "the command to plan: missing"),
        (["shard"], "the command to plan: shard. Give train or segment"),
        (["--images", "1", "segment"], "--images: 1. Give 2 or more"),
        (["segment", "--model", "nowhere", "--shards", "/nowhere"], "/nowhere does not exist"),
        (["--", "train", "--shards", "/nowhere", "--steps", "1"], "/nowhere does not exist"),
    ],
)
def test_bad_input_is_refused_before_any_trial(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status: object = cli.main(["plan", *words])
    except SystemExit as refused:  # by the option parser
        status = refused.code
    assert status == 2
    assert said in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_options_are_checked() -> None:
    with pytest.raises(InputError, match="--price: -1"):
        PlanConfig(price=-1)
