"""Defines the errors that a user may see. Each names the field, the value and the fix."""


class HeterodyneError(Exception):
    """The base of every error that is meant for a user."""


class FieldError(HeterodyneError):
    """A value from outside was refused.

    Attributes:
        field: the dotted name of what was wrong, as the user wrote it (``serving.block_size``, ``model.safetensors``).
        value: the value that was given; None where there is none that a user would know, such as for a damaged file.
        problem: the reason for the refusal, in a clause.
        fix: the thing to do about it, in a sentence.
    """

    def __init__(self, *, field: str, value: object = None, problem: str, fix: str) -> None:
        self.field = field
        self.value = value
        self.problem = problem
        self.fix = fix
        given = "" if value is None else f" (got {shorten(value)})"
        super().__init__(f"{field}: {problem}{given}. {fix}")


class InvalidConfig(FieldError):
    """The cluster YAML, the environment or the command line holds something that cannot work."""


class InvalidModel(FieldError):
    """The model directory is missing something, is damaged, or is of a kind that is not served."""


class InvalidRequest(FieldError):
    """A request cannot be served as its client wrote it."""


class NotEnoughMemory(FieldError):
    """A rank's weights and KV blocks do not fit where the plan puts them."""


def shorten(value: object, limit: int = 120) -> str:
    """Returns ``repr(value)``, cut so that a message stays readable (and never carries a whole prompt)."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def cause_of(error: BaseException) -> str:
    """Describes an exception in one line: its type and the first line of its text."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
