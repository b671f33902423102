"""What the processes of one run tell each other. Imports nothing heavy, as it runs in a process of its own."""

from __future__ import annotations


class Control:
    """A Ray actor that the driver, the workers and the data tasks of a run all know. Most of it is for training."""

    def __init__(self) -> None:
        self._start, self._stop = 0, False
        self._shown: tuple[int, dict[str, float]] | None = None
        self._warnings: dict[str, str] = {}
        self._failure: tuple[str, str, str] | None = None
        self._notes: list[str] = []
        self._used: dict[str, dict[str, float]] = {}

    def resume_at(self, step: int) -> None:
        """By rank 0, before the first batch: the step that the data must begin at."""
        self._start = step

    def start(self) -> int:
        """See ``resume_at``."""
        return self._start

    def stop(self) -> None:
        """By the driver: end after the present step."""
        self._stop = True

    def stopping(self) -> bool:
        """See ``stop``."""
        return self._stop

    def show(self, step: int, values: dict[str, float]) -> None:
        """By rank 0: how it goes."""
        self._shown = step, values

    def shown(self) -> tuple[int, dict[str, float]] | None:
        """See ``show``."""
        return self._shown

    def note(self, text: str) -> None:
        """By rank 0, at its end: what the user should know."""
        self._notes.append(text)

    def notes(self) -> list[str]:
        """See ``note``."""
        return self._notes

    def warn(self, warnings: dict[str, str]) -> None:
        """By rank 0: the warnings that hold now, by kind."""
        self._warnings = warnings

    def warnings(self) -> dict[str, str]:
        """See ``warn``."""
        return self._warnings

    def fail(self, item: str, value: str, remedy: str) -> None:
        """By a worker: an InputError met during training."""
        self._failure = item, value, remedy

    def failure(self) -> tuple[str, str, str] | None:
        """See ``fail``."""
        return self._failure

    def use(self, worker: str, used: dict[str, float]) -> None:
        """By a worker, again and again: what it has used up to now; see ``observe.used``. By a data task, once."""
        self._used[worker] = used

    def used(self) -> list[dict[str, float]]:
        """See ``use``; of each worker that there was."""
        return list(self._used.values())
