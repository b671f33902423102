"""Reading JSON by parts: the values and errors of ``json.loads``, wherever the parts end."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest

from pipelines.jsonscan import NotJsonError, Scanner


def parts(data: bytes, size: int) -> Iterator[bytes]:
    return (data[k : k + size] for k in range(0, len(data), size))


def read(data: bytes, size: int) -> dict[str, Any]:
    """The object of lists and other values, entry by entry; each entry's text must mean its value."""
    scanner, content = Scanner(parts(data, size)), {}
    for key in scanner.members():
        if scanner.peek() == "[":
            pairs = list(scanner.items())
            assert repr([json.loads(text) for text, _ in pairs]) == repr([value for _, value in pairs])
            content[key] = [value for _, value in pairs]
        else:
            text, content[key] = scanner.value()
            assert repr(json.loads(text)) == repr(content[key])
    scanner.end()
    return content


ODD: list[Any] = [
    *(0, -0.0, 1.5, 0.1 + 0.2, 1e-320, 1e300, 123456789.123456789, 2**63, 10**40, -1),
    *(float("nan"), float("inf"), -float("inf"), True, None),
    *("", 'a"b\\', "\ud800", "é中😀", "\x7f/\n", [], {}, [[]], {"a": {"": [1, 2.0]}}),
]


def value(rng: random.Random, depth: int = 3) -> Any:
    kind = rng.randrange(6) if depth else 0
    if kind == 1:
        return [value(rng, depth - 1) for _ in range(rng.randrange(4))]
    if kind == 2:
        return {rng.choice(["id", "bbox", "é", ""]): value(rng, depth - 1) for _ in range(rng.randrange(4))}
    return rng.choice([*ODD, rng.random() * 10 ** rng.randrange(-20, 20), rng.randrange(10**18)])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32-le"])
@pytest.mark.parametrize("indent", [None, 2])
def test_values_are_those_of_json_loads_wherever_the_parts_end(encoding: str, indent: int | None) -> None:
    for seed in range(40):
        rng = random.Random(seed)
        content = {name: [value(rng) for _ in range(rng.randrange(6))] for name in ("images", "annotations")}
        content |= {"info": value(rng)}
        text = json.dumps(content, indent=indent, ensure_ascii=rng.random() < 0.5)
        data = text.encode(encoding, "surrogatepass")
        for size in (1, 7, 100, 1 << 20):
            assert repr(read(data, size)) == repr(json.loads(data))  # repr, as NaN differs from itself


def test_an_entry_longer_than_many_parts() -> None:
    content = {"a": ["x" * 10_000, [1.25] * 5_000]}
    assert read(json.dumps(content).encode(), 16) == content


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            " ",
            "{",
            '{"a"',
            '{"a":',
            '{"a": [',
            '{"a": [1',
            '{"a": [1,',
            '{"a": [1}',
            '{"a": [1 2]}',
            '{"a": [1,]}',
        ),
        *(
            '{"a": 1',
            '{"a": 1,}',
            '{"a" 1}',
            "{1: 2}",
            '{"a": [tru]}',
            '{"a": ["x]}',
            '{"a": 1} 2',
            "[1]",
            '{"a": [01]}',
        ),
        '{"a": ["\\q"]}',
        '{"a": [' + '{"id": 1}, ' * 50 + '{"id" 1}, ' + '{"id": 1}, ' * 50 + "1]}",
    ],
)
def test_what_is_no_json_object_is_refused_wherever_the_parts_end(text: str) -> None:
    for size in (1, 5, 1 << 20):
        with pytest.raises(NotJsonError, match="character"):
            read(text.encode(), size)


def test_an_error_says_where_it_is() -> None:
    text = '{"a": [' + "1, " * 1000 + "oops, 2]}"
    for size in (1, 64, 1 << 20):
        with pytest.raises(NotJsonError, match=f"Expecting value: character {text.index('oops') + 1:,}"):
            read(text.encode(), size)
    with pytest.raises(NotJsonError, match="byte 0xff"):
        read(b'{"a": ["' + b"x" * 100 + b'\xff"]}', 10)


def test_a_defect_in_the_middle_is_found_without_reading_on() -> None:
    taken = 0

    def endless() -> Iterator[bytes]:
        nonlocal taken
        yield b'{"a": [{"id" 1}, '
        while True:
            taken += 1
            yield b'{"id": 1}, ' * 100

    scanner = Scanner(endless())
    next(scanner.members())
    with pytest.raises(NotJsonError):
        next(scanner.items())
    assert taken < 5
