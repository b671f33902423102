"""pipelines.outbox: everything arrives once and in order, however often the server is away."""

from __future__ import annotations

import threading

import pytest

from pipelines import outbox
from pipelines.outbox import Outbox


class Server:
    """Takes messages, except those whose turn it is to fail."""

    def __init__(self, fails: int) -> None:
        self.fails, self.got, self.up = fails, [], threading.Event()  # type: ignore[var-annotated]

    def take(self, message: int) -> None:
        if not self.up.is_set() or self.fails:
            self.fails -= self.up.is_set()
            raise ConnectionError("away")
        if message == 13:
            raise ValueError("never")
        self.got.append(message)


def test_all_arrives_in_order_when_the_server_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "LONGEST_PAUSE", 0.1)
    server, box = Server(fails=1), Outbox(lambda error: isinstance(error, ValueError))
    for message in (1, 2, 13, 3):
        box.put(f"message {message}", lambda message=message: server.take(message))  # type: ignore[misc]
    assert box.drain(0.05) == ["message 1", "message 2", "message 13", "message 3"]
    assert box.error == "away"
    server.up.set()
    assert box.drain(60) == ["message 13"]
    assert server.got == [1, 2, 3]
    assert box.error == "never"


def test_what_is_said_of_an_error_holds_no_password(capfd: pytest.CaptureFixture[str]) -> None:
    def send() -> None:
        raise ValueError("API request to http://ada:hunter2@host/api failed")

    box = Outbox(lambda error: True)
    box.put("metrics", send)
    assert box.drain(60) == ["metrics"]
    assert box.error == "API request to http://host/api failed"
    assert f"metrics was not sent yet: {box.error}\n" in capfd.readouterr().err


def test_what_is_kept_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "LIMIT", 2)
    server, box = Server(fails=0), Outbox(lambda error: False)
    for message in range(4):
        box.put(str(message), lambda message=message: server.take(message))  # type: ignore[misc]
    server.up.set()
    assert box.drain(60) == ["2", "3"]
    assert server.got == [0, 1]
