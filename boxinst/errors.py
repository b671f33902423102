"""The one error that a user's input can cause: it names the item, its value and the remedy."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input. Commands print it without a traceback and exit with status 2.

    Args:
        item: what is wrong, by the name its owner knows (an option, a file, an annotation id).
        value: the value found.
        remedy: what to do about it, as a sentence.
    """

    def __init__(self, item: str, value: object, remedy: str) -> None:
        self.item, self.value, self.remedy = item, value, remedy
        super().__init__(f"{item}: {value}. {remedy}")

    def __reduce__(self) -> tuple[type[InputError], tuple[str, object, str]]:
        # A worker's error travels to the driver by pickle, which would call __init__ with the message alone.
        return type(self), (self.item, self.value, self.remedy)
