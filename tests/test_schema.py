"""Manifests: round trip, a hash of the content alone, and what they refuse."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace

import pytest

from boxinst.errors import InputError
from pipelines.schema import SCHEMA_VERSION, Category, File, Manifest


def manifest() -> Manifest:
    file = File("shard-00000.parquet", 3, 1234, "ab" * 32)
    return Manifest("shards", [Category(7, "cell")], [file], {"images": 3}, {"annotations": "a.json"})


def test_round_trip() -> None:
    assert Manifest.from_json(manifest().to_json(), path="x", kind="shards") == manifest()


def test_hash_names_the_content_and_not_its_origin() -> None:
    one = manifest()
    assert replace(one, source={"annotations": "elsewhere.json"}).hash == one.hash
    assert replace(one, files=[replace(one.files[0], path="other-name.parquet")]).hash == one.hash
    others = [
        replace(one, kind="masks"),
        replace(one, exif="applied"),
        replace(one, categories=[Category(7, "nucleus")]),
        replace(one, files=[replace(one.files[0], sha256="cd" * 32)]),
        replace(one, files=one.files * 2),
    ]
    assert len({m.hash for m in [one, *others]}) == 6


def test_refusals() -> None:
    text = manifest().to_json()
    newer = json.dumps({**json.loads(text), "schema_version": SCHEMA_VERSION + 1})
    with pytest.raises(InputError, match=rf"p: schema version {SCHEMA_VERSION + 1}, this program reads.*Upgrade"):
        Manifest.from_json(newer, path="p")
    with pytest.raises(InputError, match=r"p: holds shards, wanted masks\. Run `boxinst segment`"):
        Manifest.from_json(text, path="p", kind="masks")
    with pytest.raises(InputError, match=r"p: hash .* does not match"):
        Manifest.from_json(text.replace("cell", "sell"), path="p")
    for broken in ("", "[]", "{}", '{"schema_version": null}'):
        with pytest.raises(InputError, match="p: not a manifest"):
            Manifest.from_json(broken, path="p")


def test_an_error_keeps_its_parts_between_processes() -> None:
    error = pickle.loads(pickle.dumps(InputError("--out", 3, "Do this.")))
    assert (error.item, error.value, error.remedy, str(error)) == ("--out", 3, "Do this.", "--out: 3. Do this.")
