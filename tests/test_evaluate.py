"""Figures of a model on shards: the same however the work is divided, and bad requests refused."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import boxinst
from boxinst import InputError, Instances
from boxinst.metrics import CocoScorer, GivenBoxScorer
from pipelines import evaluate, registry, storage
from pipelines.config import EvaluateConfig, Resolution
from pipelines.evaluate import run
from pipelines.samples import sample_from_row
from pipelines.scorecard import Evaluator, Scorecard
from pipelines.synthetic import CLASSES


def table_of(shards: str) -> pa.Table:
    return pa.concat_tables(
        pq.read_table(path) for path in storage.shard_files(shards, storage.read_manifest(shards, "shards"))
    )


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    config = boxinst.ModelConfig(classes=CLASSES, backbone="resnet18", width=16, fpn_channels=32, prompt=False)
    folder = tmp_path_factory.mktemp("detector") / "detector"
    boxinst.save(boxinst.CondInst(config), folder)
    return str(folder)


def evaluator(folder: str, mode: str = "prompt") -> Evaluator:
    model = boxinst.load(folder)
    return Evaluator(lambda: model, Resolution(0, 1333), "stored", mode, 0.0, 100, baselines=True)  # type: ignore[arg-type]


def test_the_truth_scores_one_and_the_baselines_less(shards: dict[str, str]) -> None:
    card = Scorecard(CLASSES, "prompt", 100, baselines=True)
    for row in table_of(shards["train"]).to_pylist():
        image, truth, image_id = sample_from_row(row)
        assert truth.masks is not None
        perfect = Instances(truth.boxes, torch.ones(len(truth)), torch.zeros_like(truth.labels), truth.masks)
        card.update(image_id, image.shape[1], image.shape[2], perfect, truth)
    figures = card.compute()
    assert figures["mask_iou"] == pytest.approx(1)
    assert figures["mask_ap"] == pytest.approx(1)
    for name in ("filled_box", "inscribed_ellipse"):
        assert 0.3 < figures[f"{name}_mask_iou"] < 1
        assert 0 <= figures[f"{name}_mask_ap"] < 1
    assert not [name for name in figures if name.startswith("box_ap")]  # it would only say that boxes were given


@pytest.mark.parametrize("mode", ["prompt", "detect"])
def test_divided_work_gives_the_figures_of_the_whole(
    mode: str, shards: dict[str, str], tiny_model: str, detector: str
) -> None:
    table = table_of(shards["val"])
    work = evaluator(tiny_model if mode == "prompt" else detector, mode)
    whole, divided = (Scorecard(CLASSES, mode, 100, baselines=True) for _ in range(2))  # type: ignore[arg-type]
    whole.merge(work(table)["scores"][0].as_py())
    for k in reversed(range(len(table))):
        divided.merge(work(table.slice(k, 1))["scores"][0].as_py())
    assert divided.compute() == pytest.approx(whole.compute())
    assert ("box_ap" in whole.compute()) == (mode == "detect")


def test_figures_are_those_of_the_scorers(shards: dict[str, str], tiny_model: str) -> None:
    table, model = table_of(shards["val"]), boxinst.load(tiny_model)
    coco, given = CocoScorer(CLASSES), GivenBoxScorer()
    for row in table.to_pylist():
        image, truth, image_id = sample_from_row(row)
        (found,) = model.segment([image], [truth.boxes], [truth.labels])
        coco.update(image_id, image.shape[1], image.shape[2], found, truth)
        given.update(found, truth)
    card = Scorecard(CLASSES, "prompt", 100, baselines=False)
    card.merge(_plain(evaluator(tiny_model), table))
    figures = card.compute()
    assert figures["mask_ap"] == pytest.approx(coco.compute()["mask_ap"])
    for name, value in given.compute().items():
        assert figures[name] == pytest.approx(value), name


def _plain(work: Evaluator, table: pa.Table) -> str:
    work._baselines = False
    return str(work(table)["scores"][0].as_py())


def test_boxes_alone_give_consistency_alone(shards: dict[str, str], tiny_model: str) -> None:
    card = Scorecard(CLASSES, "prompt", 100, baselines=True)
    card.merge(evaluator(tiny_model)(table_of(shards["val_boxes"]))["scores"][0].as_py())
    figures = card.compute()
    assert {"box_iou", "spill", "fill", "fill_over_95", "fill_under_05"} <= set(figures)
    assert not [name for name in figures if "mask" in name]


def test_a_crowd_is_neither_prompted_nor_scored(shards: dict[str, str], tiny_model: str) -> None:
    table = table_of(shards["val"])
    rows = table.to_pylist()
    instances = sum(len(row["boxes"]) for row in rows)
    rows[0]["crowd"][0] = True
    card = Scorecard(CLASSES, "prompt", 100, baselines=True)
    card.merge(evaluator(tiny_model)(pa.Table.from_pylist(rows, schema=table.schema))["scores"][0].as_py())
    assert card.compute()["instances"] == instances - 1


def test_the_stage_gives_and_records_the_figures(shards: dict[str, str], tiny_model: str, home: Path) -> None:
    figures = run(EvaluateConfig(tiny_model, shards["val"], experiment="scores"))
    card = Scorecard(CLASSES, "prompt", 100, baselines=True)
    card.merge(evaluator(tiny_model)(table_of(shards["val"]))["scores"][0].as_py())
    speed, images = figures.pop("images_per_second"), figures.pop("images")
    assert speed > 0
    assert images == 4
    assert figures == pytest.approx(card.compute())
    api = registry.client()
    (tracked,) = api.search_runs([api.get_experiment_by_name("scores").experiment_id])
    assert tracked.info.status == "FINISHED"
    assert tracked.data.metrics["mask_iou"] == pytest.approx(figures["mask_iou"])
    assert tracked.data.params["mode"] == "prompt"
    assert tracked.data.tags["model"] == "tiny"
    assert tracked.data.tags["shards_hash"] == storage.read_manifest(shards["val"], "shards").hash


def test_a_sample_is_spread_over_the_shards_and_scored_alone(shards: dict[str, str], tiny_model: str) -> None:
    figures = run(EvaluateConfig(tiny_model, shards["train"], max_images=5))
    chosen = [0, 2, 4, 7, 9]  # of 12
    card = Scorecard(CLASSES, "prompt", 100, baselines=True)
    card.merge(evaluator(tiny_model)(table_of(shards["train"]).take(chosen))["scores"][0].as_py())
    assert figures.pop("images") == 5
    assert figures.pop("images_per_second") > 0
    assert figures == pytest.approx(card.compute())
    assert run(EvaluateConfig(tiny_model, shards["val"], max_images=99))["images"] == 4


def test_a_sample_of_many_lots_has_every_row_once(shards: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "READ_TOGETHER", 2)
    manifest = storage.read_manifest(shards["train"], "shards")
    sample = evaluate._rows(shards["train"], manifest, 7).take_all()
    whole = table_of(shards["train"])["image_id"].to_pylist()
    assert sorted(row["image_id"] for row in sample) == sorted(whole[k * 12 // 7] for k in range(7))


def test_very_many_boxes_give_a_warning_that_names_the_option(
    shards: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = replace(storage.read_manifest(shards["val"], "shards"), counts={"images": 1_000_000, "boxes": 10**7})
    evaluate._warn(500_000, manifest)
    assert capsys.readouterr().err == "", "5 million boxes"
    evaluate._warn(1_000_000, manifest)
    assert re.search(
        r"10,000,000 boxes takes at least 33 GiB .* and 60 minutes .* --max-images", capsys.readouterr().err
    )


def test_bad_requests_are_refused(shards: dict[str, str], tiny_model: str, detector: str, tmp_path: Path) -> None:
    good = EvaluateConfig(tiny_model, shards["val"])
    other = boxinst.ModelConfig(classes=("x",), backbone="resnet18", width=16, fpn_channels=16, detect=False)
    boxinst.save(boxinst.CondInst(other), tmp_path / "other")
    for change, message in [
        ({"model": detector}, r"--mode: prompt is switched off in .*detector\. Give `--mode detect`"),
        ({"model": str(tmp_path / "other"), "mode": "detect"}, r"--mode: detect is switched off"),
        ({"model": str(tmp_path / "other")}, r"has the classes x.*trained on these classes"),
        ({"shards": "/no/shards"}, "/no/shards does not exist"),
        ({"workers": 99}, r"--workers: 99.*at most"),
    ]:
        with pytest.raises(InputError, match=message):
            run(replace(good, **change))  # type: ignore[arg-type]
    for change, message in [
        ({"mode": "guess"}, r"--mode: guess\. Give prompt or detect"),
        ({"max_images": -1}, r"--max-images: -1\. Give 0 or more"),
        ({"max_detections": 0}, r"--max-detections: 0\. Give 1 or more"),
        ({"score_threshold": 2.0}, r"--score-threshold: 2\.0\. Give a number from 0 to 1"),
    ]:
        with pytest.raises(InputError, match=message):
            replace(good, **change)  # type: ignore[arg-type]
