"""The whole circle through the commands: boxes → model → masks → verdicts → masks and boxes → the next model."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import boxinst
from jobs import cli
from pipelines import registry, review, storage
from pipelines.synthetic import SyntheticCorpus

RECIPE = """
train:
  model:
    backbone: resnet18
    width: 8
    fpn_channels: 16
    mask_branch_channels: 8
    mask_branch_layers: 1
    mask_stride: 4
    detect: false
  loss: {warmup_steps: 2}
  steps: 4
  batch_size: 4
  log_every: 1
  precision: fp32
promote:
  tolerance: 1.0
"""
"""As small as a network can be: the circle is tested here, not the masks."""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_full_circle(
    home: Path, ray_session: None, corpus: SyntheticCorpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, train, val, masks = (str(tmp_path / name) for name in ("tiny.yaml", "train", "val", "masks"))
    Path(recipe).write_text(RECIPE)
    said = ""

    def boxinst_(*words: str, status: int = 0) -> str:
        nonlocal said
        assert cli.main(words) == status
        said = capsys.readouterr().out
        return said

    # Boxes become shards: all of them, and no mask among them.
    boxinst_("shard", "--annotations", corpus.train_boxes, "--images", corpus.images, "--out", train)
    assert f"Next: boxinst train --shards {train}" in said
    boxinst_("shard", "--annotations", corpus.val, "--images", corpus.images, "--out", val)
    given = json.loads(Path(corpus.train_boxes).read_text())["annotations"]
    counts = storage.read_manifest(train, "shards").counts
    assert (counts["images"], counts["boxes"], counts["masks"]) == (12, len(given), 0)

    # Shards become a registered model that loads.
    boxinst_("train", "--recipe", recipe, "--shards", train, "--val", val, "--name", "circle")
    assert "models:/circle/1" in said
    assert boxinst.load(registry.resolve("models:/circle/1")).config.width == 8
    boxinst_("train", "--recipe", recipe, "--shards", train, "--val", val, "--name", "circle")
    assert "nothing was trained" in said

    boxinst_("evaluate", "--model", "models:/circle/1", "--shards", val)
    for row in ("the model", "inscribed ellipse", "filled box", "box_iou"):
        assert row in said

    # The model makes one row for every box.
    results = tmp_path / "results.json"
    boxinst_("segment", "--model", "models:/circle/1", "--shards", train, "--out", masks, "--coco", str(results))
    manifest = storage.read_manifest(masks, "masks")
    table = pq.read_table(storage.shard_files(masks, manifest))
    assert sorted(table["annotation_id"].to_pylist()) == sorted(a["id"] for a in given)
    assert set(table["model"].to_pylist()) == {"circle/1"}
    segmented = {row["annotation_id"] for row in table.to_pylist() if row["status"] == "ok"}
    assert {entry["annotation_id"] for entry in json.loads(results.read_text())} <= {a["id"] for a in given}

    # People judge: every third mask is accepted, rejected, or to be fixed.
    boxinst_("review", "--masks", masks, "--shards", train, "--dataset", "circle")
    verdicts = {a["id"]: ("accept", "reject", "fix")[k % 3] for k, a in enumerate(given)}
    review.tag("circle", verdicts)  # type: ignore[arg-type]
    boxinst_("review", "--masks", masks, "--shards", train, "--dataset", "circle")
    assert "0 added" in said, "a review is brought up to date, not begun again"

    # What they accepted are mask labels of the next corpus; no box is lost.
    following = str(tmp_path / "next.json")
    boxinst_("feedback", "--dataset", "circle", "--out", following)
    accepted = {annotation for annotation, verdict in verdicts.items() if verdict == "accept"} & segmented
    entries = json.loads(Path(following).read_text())["annotations"]
    assert {e["id"] for e in entries} == {a["id"] for a in given}
    assert {e["id"] for e in entries if e.get("segmentation")} == accepted
    assert accepted, "a model that makes no mask at all tests nothing"
    mixed = str(tmp_path / "mixed")
    boxinst_("shard", "--annotations", following, "--images", corpus.images, "--out", mixed)
    counts = storage.read_manifest(mixed, "shards").counts
    assert (counts["boxes"], counts["masks"]) == (len(given), len(accepted))

    # Masks and boxes train the next model together, starting from the first.
    words = ["--recipe", recipe, "--shards", mixed, "--name", "circle-mixed", "--init", "models:/circle/1"]
    boxinst_("train", *words)
    assert "models:/circle-mixed/1" in said
    run = registry.client().get_model_version("circle-mixed", "1").run_id
    assert registry.client().get_metric_history(run, "train/dice"), "the accepted masks were trained on"
    registry.register(run, registry.resolve("models:/circle-mixed/1"), "circle")

    # The first is promoted, then the second, then back.
    boxinst_("promote", "--recipe", recipe, "--name", "circle", "--candidate", "1", "--shards", val)
    assert registry.find("models:/circle@champion").version == 1
    boxinst_("promote", "--recipe", recipe, "--name", "circle", "--shards", val)
    assert registry.find("models:/circle@champion").version == 2
    boxinst_("promote", "--name", "circle", "--rollback")
    assert registry.find("models:/circle@champion").version == 1
    assert [move.action for move in registry.history("circle")] == ["promote", "promote", "rollback"]
