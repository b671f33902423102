"""The one error that a user's input can cause: it names the item, its value and the remedy."""


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
