"""Storage that throttles, resets, cuts off, lags and goes away: what is read and written is the same as without."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import ray.train
from fault_proxy import FaultProxy, Faults
from ray._common.retry import retry
from ray.train.v2._internal.constants import AWS_RETRYABLE_TOKENS

import boxinst
from boxinst.errors import InputError
from pipelines import checkpoint, claims, feed, storage, train_loop
from pipelines.config import Resolution, SegmentConfig, ShardConfig, TrainConfig
from pipelines.schema import SHARD_SCHEMA, Category, Manifest
from pipelines.segment import run as run_segment
from pipelines.segmenter import Segmenter
from pipelines.shards import _read_images
from pipelines.shards import run as run_shards
from pipelines.synthetic import SyntheticCorpus
from pipelines.train_job import Job

SCHEMA = pa.schema([("n", pa.int64()), ("image", pa.binary())])
ONCE = [Faults(**{name: 1.0}, delay=0.3, most=2) for name in ("throttle", "refuse", "reset", "truncate", "slow")]
"""Each fault, for the first two requests. Cut off in their middle are answers with a body only."""


@pytest.fixture
def proxy(s3_proxy: FaultProxy, s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy of this test's own before the server of all, so that its counters and faults are its own too."""
    with FaultProxy(s3_proxy.upstream) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
        yield proxy


def table(*numbers: int) -> pa.Table:
    return pa.table({"n": list(numbers), "image": [os.urandom(5000) for _ in numbers]}, schema=SCHEMA)


@pytest.mark.parametrize("faults", ONCE, ids=lambda f: next(k for k in vars(f) if getattr(f, k) == 1.0))
def test_everything_is_whole_whatever_happens(proxy: FaultProxy, s3: str, faults: Faults) -> None:
    data = os.urandom(20_000)

    def under_faults(operation: Callable[[], object]) -> object:
        with proxy.faults(faults):
            return operation()

    under_faults(lambda: storage.write_bytes(f"{s3}/x/a.bin", data))
    assert under_faults(lambda: storage.read_bytes(f"{s3}/x/a.bin")) == data
    rows = [table(1, 2), table(3)]
    entry = under_faults(lambda: storage.write_parquet(f"{s3}/x/b.parquet", rows, SCHEMA))
    manifest = Manifest("shards", [Category(1, "cell")], [entry], {})  # type: ignore[list-item]
    assert under_faults(lambda: pa.concat_tables(storage.row_groups(f"{s3}/x", manifest))) == pa.concat_tables(rows)
    assert list(under_faults(lambda: storage.list_files(f"{s3}/x"))) == ["a.bin", "b.parquet"]  # type: ignore[call-overload]
    under_faults(lambda: storage.clear(f"{s3}/x", keep=["b.parquet"]))
    assert list(storage.list_files(f"{s3}/x")) == ["b.parquet"]
    (kind,) = proxy.met
    assert proxy.met[kind] > 4, "each operation but those without a body has met it"


@pytest.mark.parametrize("fault", ["reset", "truncate"])
def test_an_answer_that_says_no_may_break_off_too(
    proxy: FaultProxy, s3: str, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    with proxy.faults(Faults(**{fault: 1.0}, most=2)), pytest.raises(FileNotFoundError):
        storage.read_bytes(f"{s3}/none.bin")
    assert proxy.met[fault] == 2
    with proxy.faults(Faults(**{fault: 1.0}, most=2)), claims.held(f"{s3}/out", "--out"):
        assert proxy.met[fault] == 4
    monkeypatch.setattr("pipelines.s3.PATIENCE", 0.5)
    with proxy.faults(Faults(**{fault: 1.0})), pytest.raises(InputError, match="keeps breaking off"):
        storage.read_bytes(f"{s3}/none.bin")


def test_a_large_object_whose_last_answer_is_lost_is_there_once_and_whole(
    proxy: FaultProxy, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.s3.PART", 5 << 20)
    data = os.urandom(11 << 20)
    with (
        proxy.faults(Faults(reset=1, most=1, on="CompleteMultipartUpload")),
        storage.writing(f"{s3}/large.bin") as stream,
    ):
        stream.write(data)
    assert proxy.met["reset"] == 1
    assert proxy.done["UploadPart"] >= 3
    assert next(iter(storage.list_files(s3).values())).size == len(data)
    assert storage.read_bytes(f"{s3}/large.bin") == data


def test_a_failed_write_leaves_the_old_object(s3: str) -> None:
    storage.write_bytes(f"{s3}/x.bin", b"old")

    def fail() -> None:
        with storage.writing(f"{s3}/x.bin") as stream:
            stream.write(b"half of the ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert storage.read_bytes(f"{s3}/x.bin") == b"old"


def test_an_object_that_is_shorter_than_listed_is_not_taken(
    proxy: FaultProxy, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write_bytes(f"{s3}/a.bin", data := os.urandom(1000))
    with proxy.faults(Faults(shorten=1, most=2, on="GetObject")):
        assert storage.read_bytes(f"{s3}/a.bin", len(data)) == data
    assert proxy.met["shorten"] == 2
    monkeypatch.setattr("pipelines.s3.PATIENCE", 0.5)
    with proxy.faults(Faults(shorten=1)), pytest.raises(InputError, match=r"keeps breaking off \(ShortReadError\)"):
        storage.read_bytes(f"{s3}/a.bin", len(data))


def test_an_outage_is_bridged(proxy: FaultProxy, s3: str) -> None:
    storage.write_bytes(f"{s3}/a.bin", b"data")
    fs, path = storage.fs_path(f"{s3}/a.bin")
    proxy.outage(2)
    assert storage.read_bytes(f"{s3}/a.bin") == b"data"
    proxy.outage(2)
    with fs.open_input_file(path) as stream:
        assert stream.read() == b"data"


def test_a_longer_outage_names_the_server(proxy: FaultProxy, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = storage.write_parquet(f"{s3}/b.parquet", [table(1)], SCHEMA)
    manifest = Manifest("shards", [], [entry], {})
    monkeypatch.setattr("pipelines.s3.PATIENCE", 0.5)
    monkeypatch.setattr("pipelines.s3.ARROW_ATTEMPTS", 1)
    proxy.outage(60)
    for call in (
        lambda: storage.read_bytes(f"{s3}/b.parquet"),
        lambda: storage.write_bytes(f"{s3}/c.bin", b""),
        lambda: storage.list_files(s3),
        lambda: list(storage.row_groups(s3, manifest)),
    ):
        with pytest.raises(InputError, match=rf"{s3}: nobody answers at {proxy.address}\. Start it"):
            call()


def test_images_are_read_a_few_at_a_time(proxy: FaultProxy, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.shards.READ_AHEAD", 4)
    for k in range(12):
        storage.write_bytes(f"{s3}/images/{k}", bytes([k]) * 10)
    names = [str(k) for k in range(12)]
    plan = pa.table({"image_id": range(12), "file_name": names, "bytes": [10] * 12, "annotations": ["[]"] * 12})
    plan = plan.append_column("width", pa.nulls(12)).append_column("height", pa.nulls(12))
    proxy.at_once = 0
    proxy.done.clear()
    with proxy.faults(Faults(slow=1, delay=0.1)):
        found = [data for _, data in _read_images(plan, f"{s3}/images")]
    assert found == [bytes([k]) * 10 for k in range(12)]
    assert 1 < proxy.at_once <= 4
    assert proxy.done == {"GetObject": 12}, "one request for an image"


def test_a_row_group_comes_in_few_requests(proxy: FaultProxy, s3: str) -> None:
    row = {
        "image_id": 1,
        "file_name": "a.png",
        "image": os.urandom(1 << 20),
        "width": 4,
        "height": 4,
        "annotation_ids": [1],
        "boxes": [[0.0, 0.0, 2.0, 2.0]],
        "labels": [0],
        "masks": [None],
        "crowd": [False],
    }
    rows = pa.Table.from_pylist([row], schema=SHARD_SCHEMA)
    entry = storage.write_parquet(f"{s3}/s.parquet", [rows, rows], SHARD_SCHEMA)
    storage.write_manifest(s3, Manifest("shards", [Category(1, "cell")], [entry], {"images": 2, "boxes": 2}))
    index = feed.ShardIndex.open(s3)
    proxy.done.clear()
    with proxy.faults(Faults(truncate=1, most=1, on="GetObject")):
        assert index.read(index.starts[:1]).to_pylist() == [row]
    assert proxy.met["truncate"] == 1
    assert proxy.done["GetObject"] <= 4, "the directory and ten columns, and once more what was cut off"


# The stages

ROUGH = Faults(throttle=0.1, reset=0.1, truncate=0.1)


def test_shards_and_masks_are_the_same_under_faults(
    s3_proxy: FaultProxy, s3: str, corpus: SyntheticCorpus, shards: dict[str, str], tiny_model: str
) -> None:
    for path in Path(corpus.images).iterdir():
        storage.write_bytes(f"{s3}/images/{path.name}", path.read_bytes())
    storage.write_bytes(f"{s3}/val.json", Path(corpus.val).read_bytes())
    before = s3_proxy.met.copy()
    with s3_proxy.faults(ROUGH):  # the session's, which Ray's workers ask
        made = run_shards(ShardConfig(f"{s3}/val.json", f"{s3}/images", f"{s3}/shards"))
        masks = run_segment(SegmentConfig(tiny_model, f"{s3}/shards", f"{s3}/masks", coco=f"{s3}/results.json"))
    met = s3_proxy.met - before
    assert all(met[fault] for fault in ("throttle", "reset", "truncate")), met

    wanted = storage.read_manifest(shards["val"])
    assert (made.hash, made.counts) == (wanted.hash, wanted.counts)
    images = pa.concat_tables(storage.row_groups(shards["val"], wanted))
    calm = Segmenter(lambda: boxinst.load(tiny_model), Resolution(0, 1333), "stored")(images).to_pylist()
    rows = pa.concat_tables(storage.row_groups(f"{s3}/masks", masks)).to_pylist()
    assert [row["annotation_id"] for row in rows] == [n for row in calm for n in row["annotation_id"]]
    assert [row["mask"] for row in rows] == [mask for row in calm for mask in row["mask"]]
    assert masks.counts["boxes"] == made.counts["boxes"] == len(json.loads(storage.read_bytes(f"{s3}/results.json")))
    left = set(storage.list_files(f"{s3}/masks"))
    assert left == {"manifest.json", *(file.path for file in masks.files)}


def test_a_checkpoint_that_the_store_does_not_take_ends_with_the_errors_of_the_store(
    proxy: FaultProxy, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under the hand of Ray, which tries again where it knows the error by its words."""
    monkeypatch.setattr("pipelines.s3.PATIENCE", 0.5)
    monkeypatch.setattr("pipelines.s3.ARROW_ATTEMPTS", 1)
    fs, path = storage.fs_path(s3)
    made = tmp_path / "checkpoint"
    checkpoint.save(made, {"step": 1})
    run, local = SimpleNamespace(experiment_fs_path=path, storage_filesystem=fs), ray.train.Checkpoint(str(made))
    job = Job(TrainConfig(shards="s", steps=1), "hash", None, None, "run", "", None)
    upload = retry("upload checkpoint", match=AWS_RETRYABLE_TOKENS, max_attempts=3)(train_loop._upload)
    with proxy.faults(Faults(throttle=1)), pytest.raises(OSError, match=r"S3 error UNKNOWN \(HTTP status 503\)"):
        upload(job, run, None, local, "checkpoint_1")
    assert not made.exists()


# The whole path

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
  steps: 6
  batch_size: 4
  checkpoint_every: 2
  eval_every: 3
  log_every: 1
  precision: fp32
segment:
  checkpoint_images: 4
promote:
  tolerance: 1.0
"""
WALK = """
import pickle, sys
from dataclasses import asdict
from jobs import walk

corpus, recipe, folder, result = sys.argv[1:]
path = walk.Walk("circle", recipe, folder, walk.find_corpus(corpus))
out = walk.go(path)
with open(result, "wb") as file:
    pickle.dump(asdict(out) | {"verdicts": dict(out.verdicts)}, file)
"""
MIXED = Faults(throttle=0.03, refuse=0.03, reset=0.05, truncate=0.05, slow=0.05, delay=1.0)
OUTAGE = 20.0


def walked(proxy: FaultProxy, bucket: str, corpus: SyntheticCorpus, home: Path) -> dict[str, Any]:
    """The outcome of the whole path, from a corpus in a bucket to a champion, with all that is kept in that bucket."""
    for path in Path(corpus.images).parent.rglob("*.*"):
        storage.write_bytes(f"{bucket}/corpus/{path.relative_to(Path(corpus.images).parent)}", path.read_bytes())
    home.mkdir()
    (home / "recipe.yaml").write_text(RECIPE)
    words = [f"{bucket}/corpus", str(home / "recipe.yaml"), f"{bucket}/demo", str(home / "result")]
    variables = {"BOXINST_HOME": str(home), "BOXINST_STORE": f"{bucket}/store", "AWS_ENDPOINT_URL": proxy.address}
    with (home / "log").open("wb") as log:
        done = subprocess.run(
            [sys.executable, "-c", WALK, *words], env=os.environ | variables, stdout=log, stderr=log, check=False
        )
    said = (home / "log").read_text()
    assert done.returncode == 0, said[-5000:]
    assert "testing-secret" not in said
    return pickle.loads((home / "result").read_bytes())


def when(proxy: FaultProxy, key: str, then: Callable[[], None]) -> threading.Thread:
    """Do something, once, as soon as an object whose key holds ``key`` has been written."""

    def wait() -> None:
        while not any(operation in ("PutObject", "UploadPart") and key in name for operation, name in proxy.keys):
            time.sleep(0.05)
        then()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_whole_path_is_the_same_with_faults_and_without(
    s3_proxy: FaultProxy, s3: str, corpus: SyntheticCorpus, tmp_path: Path
) -> None:
    import boto3

    outcomes, masks, following, written = [], [], [], []
    for name in ("calm", "rough"):
        bucket = f"{s3}-{name}"
        boto3.client("s3").create_bucket(Bucket=bucket.removeprefix("s3://"))
        with FaultProxy(s3_proxy.upstream, seed=1) as proxy, ExitStack() as stack:
            if name == "rough":
                stack.enter_context(proxy.faults(MIXED))
                away = [
                    when(proxy, "runs/circle/checkpoint_", lambda: proxy.outage(OUTAGE)),
                    when(proxy, "demo/masks/parts/", lambda: proxy.outage(OUTAGE, listening=True)),
                ]
            outcomes.append(walked(proxy, bucket, corpus, tmp_path / name))
            written.append(Counter(operation for operation, _ in proxy.keys))
            if name == "rough":
                assert not any(thread.is_alive() for thread in away), "both outages have been"
                assert all(proxy.met[fault] for fault in ("throttle", "refuse", "reset", "truncate", "slow", "outage"))
                print(dict(proxy.met), file=sys.stderr)
        manifest = storage.read_manifest(f"{bucket}/demo/masks", "masks")
        table = pa.concat_tables(storage.row_groups(f"{bucket}/demo/masks", manifest))
        masks.append(table.to_pylist())
        following.append(json.loads(storage.read_bytes(f"{bucket}/demo/next.json")))

    calm, rough = outcomes
    for part in ("shards", "val"):
        assert [file["sha256"] for file in calm[part]["files"]] == [file["sha256"] for file in rough[part]["files"]]
    for part in ("shards", "val", "masks"):
        assert calm[part]["counts"] == rough[part]["counts"]
    counts = rough["shards"]["counts"]
    assert counts["entered_images"] == counts["images"] == 12
    assert counts["entered_boxes"] == counts["boxes"] == rough["masks"]["counts"]["boxes"] == rough["corpus"]["boxes"]
    # Two trainings of the same seed on one machine agree but for the last digits of their weights.
    assert calm["trained"]["metrics"] == pytest.approx(rough["trained"]["metrics"], abs=1e-6)
    for outcome in outcomes:
        assert outcome["trained"]["resumed_from"] == 0, "no worker has failed and begun again"
        del outcome["figures"]["images_per_second"]
    assert calm["figures"] == pytest.approx(rough["figures"], abs=1e-6)
    for row, other in zip(*masks, strict=True):
        assert row.pop("score") == pytest.approx(other.pop("score"), abs=1e-5)
        assert row == other
    assert calm["verdicts"] == rough["verdicts"]
    assert calm["corpus"]["masks"] == rough["corpus"]["masks"]
    assert len(following[0]["annotations"]) == counts["boxes"]
    assert following[0] == following[1]
    print(written, file=sys.stderr)
