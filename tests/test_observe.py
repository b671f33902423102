"""What a run shows: figures that Prometheus can fetch from the node, and lines of progress."""

from __future__ import annotations

import functools
import io
import json
import re
import time
import urllib.request
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from tqdm import tqdm

import boxinst
from boxinst.structures import Batch, Targets
from pipelines import cluster, observe, segment, train
from pipelines.config import Resolution
from pipelines.control import Control
from pipelines.schema import SHARD_SCHEMA
from pipelines.segmenter import Segmenter
from pipelines.synthetic import SyntheticCorpus


def served() -> dict[tuple[str, str], float]:
    """Sums over all workers of this node, by (name, command), as Prometheus would get them."""
    (node,) = ray.nodes()
    with urllib.request.urlopen(f"http://127.0.0.1:{node['MetricsExportPort']}/metrics", timeout=10) as page:
        text = page.read().decode()
    sums: dict[tuple[str, str], float] = {}
    for name, tags, value in re.findall(r"^ray_boxinst_(\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
        command = re.search(r'command="(\w+)"', tags)
        key = name, command[1] if command else ""
        sums[key] = sums.get(key, 0.0) + float(value)
    return sums


def grown(before: dict[tuple[str, str], float], wanted: dict[tuple[str, str], float]) -> dict[tuple[str, str], float]:
    """What the figures have grown by, once they have reached ``wanted`` or a minute is over."""
    deadline = time.monotonic() + 60
    while True:
        now = served()
        found = {key: now.get(key, 0.0) - before.get(key, 0.0) for key in wanted}
        if all(found[key] >= wanted[key] for key in wanted) or time.monotonic() > deadline:
            return found
        time.sleep(0.5)


def test_what_workers_have_used_is_the_most_memory_the_mean_of_their_waits_and_all_that_they_read() -> None:
    workers = [{"memory": 1.0, "data_wait": 0.2}, {"memory": 3.0, "gpu_memory": 2.0, "data_wait": 0.4}]
    workers += [{"store_bytes": 5}, {"store_bytes": 7}]
    used = {"memory": 3.0, "gpu_memory": 2.0, "data_wait": 0.3, "store_bytes": 12}
    assert observe.used(workers) == pytest.approx(used)
    assert observe.used([]) == {}


def test_the_node_serves_what_the_workers_count(
    ray_session: None, corpus: SyntheticCorpus, tiny_model: str, tmp_path: Path
) -> None:
    from pipelines.shards import ShardConfig, run

    before = served()
    labels = json.loads(Path(corpus.val).read_text())
    labels["annotations"][0]["bbox"][2] = -1
    labels["images"].append({"id": 10**6, "file_name": "missing.png", "width": 8, "height": 8})
    (tmp_path / "val.json").write_text(json.dumps(labels))
    out = str(tmp_path / "shards")
    manifest = run(ShardConfig(annotations=str(tmp_path / "val.json"), images=corpus.images, out=out))
    assert manifest.counts["rejected_boxes"] == 1
    images = [torch.zeros(3, 8, 8), torch.zeros(3, 8, 8)]
    targets = Targets(torch.tensor([[1.0, 1, 5, 5]] * 3), torch.zeros(3, dtype=torch.int64))
    batch = Batch(torch.stack(images), torch.ones(2, 8, 8, dtype=torch.bool), [targets, targets], [1, 2])
    assert list(observe.steps(iter([batch, batch]))) == [batch, batch]
    rows = pq.read_table(f"{out}/{manifest.files[0].path}").to_pylist()
    rows[0]["image"] = b"no image"
    broken, whole = len(rows[0]["boxes"]), sum(len(row["boxes"]) for row in rows[1:])
    control = cluster.actor_here(Control)
    count = functools.partial(segment._count, control)
    worker = Segmenter(lambda: boxinst.load(tiny_model), Resolution(0, 1000), manifest.exif, count)
    worker(pa.Table.from_pylist(rows, schema=SHARD_SCHEMA))
    assert ray.get(control.used.remote())[0]["memory"] > 0.05
    wanted = {
        ("images_total", "shard"): manifest.counts["images"],
        ("boxes_total", "shard"): manifest.counts["boxes"],
        ("rejects_total", "shard"): 2,  # one that a worker finds, and one found before they start
        ("images_total", "segment"): len(rows),
        ("boxes_total", "segment"): broken + whole,
        ("mask_rows_total", "segment"): broken + whole,
        ("rejects_total", "segment"): broken,
        ("images_total", "train"): 4,
        ("boxes_total", "train"): 12,
        ("step_seconds_count", ""): 2,
    }
    assert grown(before, wanted) == wanted
    held, deadline = ("memory_gb", "train"), time.monotonic() + 60
    while held not in (now := served()) and time.monotonic() < deadline:  # a gauge is shown for as long as it is set
        observe.count("train")
        time.sleep(0.5)
    assert 0.05 < now[held] < 50


def test_a_training_shows_its_speed_and_its_wait_for_data() -> None:
    shown = io.StringIO()
    figures = {"loss": 1.2345, "learning_rate": 1e-3, "images_per_second": 12.34, "data_wait": 0.256}
    with tqdm(total=100, file=shown, mininterval=0) as bar:
        train._show(bar, None)
        train._show(bar, (20, figures))
        on_cpu = shown.getvalue()
        train._show(bar, (40, figures | {"gpu_memory": 3.21}))
    assert "20/100" in on_cpu
    for words in ("loss=1.234", "lr=1.0e-03", "images_per_s=12.3", "data_wait=26%"):
        assert words in on_cpu
    assert "gpu_gb" not in on_cpu
    assert "gpu_gb=3.2" in shown.getvalue()


@pytest.mark.parametrize("nouns", [[], ["shards"]])
def test_progress_is_told_where_no_bar_is_shown(
    nouns: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(observe, "PROGRESS_SECONDS", 0.01)
    asked = iter([3, 5])

    def done() -> int:
        return next(asked, 0) or 1 // 0  # a store that does not answer

    with observe.progress("segment", done, 8, *nouns):
        time.sleep(0.2)
    (line,) = capsys.readouterr().err.splitlines()
    noun = nouns[0] if nouns else "images"
    assert re.fullmatch(rf"segment: 5 of 8 {noun}, \d+\.\d {noun}/s", line)
