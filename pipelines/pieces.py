"""One COCO JSON file of any length becomes pieces, cut by images, each of a size that the other commands can hold.

Memory follows the number of images, at most some 50 bytes for each, and not that of the boxes. The file is read twice:
once for the ids of its images, once to hand every entry, as the text that it is, to the piece of its image.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from boxinst.errors import InputError
from pipelines import claims, coco, observe, storage
from pipelines.config import CutConfig
from pipelines.jsonscan import NotJsonError, Scanner
from pipelines.schema import Category, File, Manifest

BUFFER = 16 << 20
"""Characters of entries that are held before they are written."""
BATCH = 4096
"""Entries whose pieces are looked up together."""
MOST = 100_000
"""Pieces that the names of their files tell apart."""


def run(config: CutConfig) -> Manifest:
    """Write the pieces, and the manifest last.

    Every entry of the lists "images" and "annotations" goes to one piece, as it stands in the file and in its order; a
    defective one too, so that `shard` rejects it with its reason: a second image of an id follows the first, and what
    has no image goes to the first piece. All else that the file holds goes to every piece. Sharding all pieces gives
    the rows that sharding the whole would, with one difference: `shard` sees that an annotation's id is there twice
    only where both are in one piece.

    Returns:
        The manifest; ``rows`` of a file are its images.

    Raises:
        InputError: something about the file, the storage or the output folder that its owner has to change.
    """
    storage.check(config.annotations, config.output)
    with claims.held(config.output, "--out") as claim:
        return _run(config, claim)


def _run(config: CutConfig, claim: claims.Claim) -> Manifest:
    """See ``run``; the output is claimed."""
    storage.check_readable(config.annotations, "--annotations")
    with _Reader.opened(config.annotations) as reader:
        outline = _outline(reader)
        source = {
            "annotations": storage.absolute(config.annotations),
            "annotations_sha256": reader.sha256,
            "images_per_piece": config.images_per_piece,
        }
        finished = storage.ensure_output(config.output, "pieces", source, overwrite=config.overwrite)
        if finished is not None:
            print(f"{config.output} holds the pieces of this file already: nothing to do.", file=sys.stderr)
            return finished
        storage.clear(config.output, keep=[storage.CLAIM])  # what a killed run has left
        places = Places(np.frombuffer(outline.ids, np.int64), config.images_per_piece)
        if places.pieces > MOST:
            remedy = f"Give at least {-(-len(outline.ids) // MOST):,}."
            raise InputError("--images-per-piece", f"{config.images_per_piece} makes {places.pieces:,} pieces", remedy)
        # Beside the pieces of this machine, so that they need no room twice.
        beside = None if storage.is_s3(config.output) else storage.fs_path(config.output)[1]
        with tempfile.TemporaryDirectory(prefix="boxinst-", dir=beside) as folder, storage.explained(folder):
            writer = _Writer(Path(folder), places.pieces, outline.others)
            _distribute(reader, places, writer)
            if reader.sha256 != source["annotations_sha256"]:
                raise InputError("--annotations", f"{reader.path} has changed meanwhile", "Let it be while it is read.")
            entered = {"images": outline.images, "annotations": outline.boxes}
            written = {name: sum(counts) for name, counts in writer.counts.items()}
            if written != entered:
                raise RuntimeError(f"the file has {entered}, the pieces have {written}")
            files = writer.publish(config.output)
    counts = {"images": outline.images, "boxes": outline.boxes, "most_boxes": max(writer.counts["annotations"])}
    manifest = Manifest("pieces", outline.categories, files, counts, source)
    claim.check()
    storage.write_manifest(config.output, manifest)
    return manifest


# --- reading --------------------------------------------------------------------------------------------------------


class _Reader:
    """The file, which is read from its start as often as it is asked for; see ``opened``."""

    def __init__(self, uri: str, tell: Callable[[int], object]) -> None:
        self._uri, self._tell = uri, tell
        self.path = storage.redact(uri)
        self.sha256 = ""
        """Of the last reading, once it has come to the end."""

    @classmethod
    @contextmanager
    def opened(cls, uri: str) -> Iterator[_Reader]:
        """With progress shown, for two readings.

        Raises:
            InputError: what is read within the block is not JSON.
        """
        total, done = 2 * storage.size(uri), 0

        def tell(size: int) -> None:
            nonlocal done
            done += size
            bar.update(size)

        with (
            tqdm(total=total, desc="cut", unit="B", unit_scale=True, disable=None) as bar,
            observe.progress("cut", lambda: done >> 20, total >> 20, "MiB"),
        ):
            reader = cls(uri, tell)
            try:
                yield reader
            except NotJsonError as error:
                raise coco.not_json(reader.path, error) from None

    def members(self) -> Iterator[tuple[str, Scanner]]:
        """Each member of the file's object, by its key; take its value from the scanner.

        Raises:
            InputError: the file holds no object.
        """
        scanner = Scanner(self._chunks())
        if scanner.peek() != "{":
            scanner.value()
            scanner.end()
            raise coco.no_list(self.path, coco.LISTS[0])
        for key in scanner.members():
            yield key, scanner
        scanner.end()

    def _chunks(self) -> Iterator[bytes]:
        sha256 = hashlib.sha256()
        for chunk in storage.chunks(self._uri):
            sha256.update(chunk)
            self._tell(len(chunk))
            yield chunk
        self.sha256 = sha256.hexdigest()


@dataclass
class _Outline:
    """What there is to cut."""

    ids: array[int]
    """Of the images, in the order of the file; those that are integers."""
    images: int
    boxes: int
    categories: list[Category]
    others: dict[str, str]
    """Text of every member that all pieces have, by its key."""


def _outline(reader: _Reader) -> _Outline:
    """The first reading.

    Raises:
        InputError: the file is no COCO file of instances.
    """
    found = _Outline(array("q"), 0, 0, [], {})
    seen: set[str] = set()
    for key, scanner in reader.members():
        if key in coco.LISTS:
            if scanner.peek() != "[":
                raise coco.no_list(reader.path, key)
            if key in seen:
                raise InputError("--annotations", f'{reader.path} has "{key}" twice', "Give a file that has it once.")
            seen.add(key)
        if key == "images":
            for _, item in scanner.items():
                found.images += 1
                number = _integer(item, "id")
                if number is not None:
                    found.ids.append(number)
        elif key == "annotations":
            found.boxes = sum(1 for _ in scanner.items())
        else:
            found.others[key], value = scanner.value()
            if key == "categories":
                found.categories = coco.read_categories(value, reader.path)
    for key in coco.LISTS:
        if key not in seen:
            raise coco.no_list(reader.path, key)
    if not found.images:
        raise coco.no_images(reader.path)
    return found


def _integer(item: Any, key: str) -> int | None:
    """The id under ``key`` of an entry, whatever that is."""
    return coco.integer(item.get(key)) if isinstance(item, dict) else None


class Places:
    """Which piece every image is in: each takes ``size`` ids, in the order of the file.

    Args:
        ids: of the images, in the order of the file; the first of an id counts.
        size: images of a piece.
    """

    def __init__(self, ids: NDArray[np.int64], size: int) -> None:
        if (np.diff(ids) > 0).all():  # as most files have them, and nothing has to be sorted
            self._ids, self._piece = ids, (np.arange(len(ids)) // size).astype(np.int32)
        else:
            self._ids, first = np.unique(ids, return_index=True)
            self._piece = np.empty(len(first), np.int32)
            self._piece[np.argsort(first)] = np.arange(len(first)) // size
        self.pieces = max(1, -(-len(self._ids) // size))
        """How many there are."""

    def of(self, ids: Iterable[int | None]) -> NDArray[np.int32]:
        """The piece of each; the first one for what is no image's id."""
        wanted = list(ids)
        numbers = np.array([0 if number is None else number for number in wanted], np.int64)
        if not len(self._ids):
            return np.zeros(len(numbers), np.int32)
        place = np.searchsorted(self._ids, numbers).clip(max=len(self._ids) - 1)
        known = (self._ids[place] == numbers) & [number is not None for number in wanted]
        return np.where(known, self._piece[place], 0)


# --- writing --------------------------------------------------------------------------------------------------------


def _distribute(reader: _Reader, places: Places, writer: _Writer) -> None:
    """The second reading: every entry to its piece."""
    for key, scanner in reader.members():
        if key not in writer.counts:
            scanner.value()
            continue
        name = "id" if key == "images" else "image_id"
        writer.begin(key)
        items = scanner.items()
        while entries := list(islice(items, BATCH)):
            writer.add([text for text, _ in entries], places.of(_integer(item, name) for _, item in entries))
        writer.end()


class _Writer:
    """Pieces in a folder of this machine, any number of them: entries are held, and then each file is opened in turn.

    Args:
        folder: empty.
        pieces: how many.
        others: text of the members that each begins with.
    """

    def __init__(self, folder: Path, pieces: int, others: dict[str, str]) -> None:
        self.counts = {name: [0] * pieces for name in ("images", "annotations")}
        """Entries of each piece."""
        self._paths = [folder / f"piece-{k:05d}.json" for k in range(pieces)]
        self._sha256 = [hashlib.sha256() for _ in range(pieces)]
        self._held: list[list[str]] = [[] for _ in range(pieces)]
        self._characters = 0
        self._list = ""  # that is being written
        members = "".join(f"{json.dumps(key)}: {text},\n" for key, text in others.items())
        self._before = f"{{{members}"  # what stands before the next list

    def begin(self, name: str) -> None:
        """Begin the list ``name``."""
        self._list = name
        for piece in range(len(self._paths)):
            self._append(piece, f'{self._before}"{name}": [\n')
        self._before = ",\n"

    def add(self, entries: list[str], pieces: NDArray[np.int32]) -> None:
        """Add entries to the list, each to its piece."""
        counts = self.counts[self._list]
        for text, piece in zip(entries, pieces.tolist(), strict=True):
            held = self._held[piece]
            if counts[piece]:
                held.append(",\n")
            held.append(text)
            counts[piece] += 1
            self._characters += len(text)
        if self._characters >= BUFFER:
            self._flush()

    def end(self) -> None:
        """End the list."""
        self._flush()
        for piece in range(len(self._paths)):
            self._append(piece, "\n]")

    def publish(self, uri: str) -> list[File]:
        """Move the pieces to their folder."""
        files = []
        for piece, path in enumerate(self._paths):
            self._append(piece, "}\n")
            about = self.counts["images"][piece], path.stat().st_size, self._sha256[piece].hexdigest()
            storage.move(path, storage.join(uri, path.name))
            files.append(File(path.name, *about))
        return files

    def _flush(self) -> None:
        for piece, texts in enumerate(self._held):
            if texts:
                self._append(piece, "".join(texts))
                texts.clear()
        self._characters = 0

    def _append(self, piece: int, text: str) -> None:
        data = text.encode("utf-8", "surrogatepass")
        self._sha256[piece].update(data)
        with self._paths[piece].open("ab") as stream:
            stream.write(data)
