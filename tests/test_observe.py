"""What a run shows: figures that Prometheus can fetch from the node, and lines of progress."""

from __future__ import annotations

import re
import time
import urllib.request
from pathlib import Path

import pytest
import ray
import torch

from boxinst.structures import Batch, Targets
from pipelines import observe
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


def test_what_workers_have_used_is_the_most_memory_and_the_mean_of_their_waits() -> None:
    workers = [{"memory": 1.0, "data_wait": 0.2}, {"memory": 3.0, "gpu_memory": 2.0, "data_wait": 0.4}]
    assert observe.used(workers) == pytest.approx({"memory": 3.0, "gpu_memory": 2.0, "data_wait": 0.3})
    assert observe.used([]) == {}


def test_the_node_serves_what_the_workers_count(ray_session: None, corpus: SyntheticCorpus, tmp_path: Path) -> None:
    from pipelines.shards import ShardConfig, run

    before = served()
    manifest = run(ShardConfig(annotations=corpus.val, images=corpus.images, out=str(tmp_path / "shards")))
    images = [torch.zeros(3, 8, 8), torch.zeros(3, 8, 8)]
    targets = Targets(torch.tensor([[1.0, 1, 5, 5]] * 3), torch.zeros(3, dtype=torch.int64))
    batch = Batch(torch.stack(images), torch.ones(2, 8, 8, dtype=torch.bool), [targets, targets], [1, 2])
    assert list(observe.steps(iter([batch, batch]))) == [batch, batch]
    wanted = {
        ("images_total", "shard"): manifest.counts["images"],
        ("boxes_total", "shard"): manifest.counts["boxes"],
        ("images_total", "train"): 4,
        ("boxes_total", "train"): 12,
        ("step_seconds_count", ""): 2,
    }
    assert grown(before, wanted) == wanted
    assert 0.05 < served()["memory_gb", "train"] < 50


def test_progress_is_told_where_no_bar_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(observe, "PROGRESS_SECONDS", 0.01)
    asked = iter([3, 5])

    def done() -> int:
        return next(asked, 0) or 1 // 0  # a store that does not answer

    with observe.progress("segment", done, 8, "blocks"):
        time.sleep(0.2)
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"segment: 5 of 8 blocks, \d+\.\d blocks/s", line)
