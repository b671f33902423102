"""What is to be sent to a server that may be away: kept in order, sent by a thread that tries until it succeeds."""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable

from pipelines.redaction import redact

LONGEST_PAUSE = 10.0
"""Seconds between two attempts, at most."""
LIMIT = 20_000
"""Messages kept; those beyond are lost, so that a server away for days does not cost the machine's memory."""


class Outbox:
    """Messages in the order in which they were put.

    Args:
        hopeless: whether an error means that this message will never be taken, as opposed to a server that is away.
    """

    def __init__(self, hopeless: Callable[[Exception], bool]) -> None:
        self._hopeless = hopeless
        self._messages: deque[tuple[str, Callable[[], object]]] = deque()
        self._lost: list[str] = []
        self._changed = threading.Condition()
        self._error = ""
        threading.Thread(target=self._send, name="outbox", daemon=True).start()

    def put(self, name: str, send: Callable[[], object]) -> None:
        """Have ``send()`` called soon, and again until it does not raise.

        Args:
            name: for the report of what was lost.
            send: sends the message.
        """
        with self._changed:
            if len(self._messages) < LIMIT:
                self._messages.append((name, send))
            else:
                self._lost.append(name)
            self._changed.notify_all()

    def drain(self, patience: float) -> list[str]:
        """Wait until all is sent, at most ``patience`` seconds. Returns the names of what was not, in order."""
        with self._changed:
            self._changed.wait_for(lambda: not self._messages, patience)
            return self._lost + [name for name, _ in self._messages]

    @property
    def error(self) -> str:
        """The last one, in one line and without secrets; empty when there was none."""
        return self._error

    def _send(self) -> None:
        pause = 0.5
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._messages))
                name, send = self._messages[0]
            try:
                send()
            except Exception as error:
                self._error = redact(" ".join(str(error).split()))[:300]
                if pause == 0.5 or self._hopeless(error):
                    print(f"{name} was not sent yet: {self._error}", file=sys.stderr)
                if not self._hopeless(error):
                    time.sleep(pause)
                    pause = min(2 * pause, LONGEST_PAUSE)
                    continue
                self._lost.append(name)
            pause = 0.5
            with self._changed:
                self._messages.popleft()
                self._changed.notify_all()
