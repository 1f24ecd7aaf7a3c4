"""Defines the errors that a user may see. Each names the field, the value and the fix."""

from collections.abc import Mapping
from dataclasses import dataclass, field


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedy:
    """Changes which together make a plan fit in memory. Every size is exactly what the user is told.

    Attributes:
        kv_cache_bytes: the size to set ``serving.kv_cache`` to; None: leave it.
        is_more_kv: whether that is more than what was set.
        worker_bytes: the least memory to give who is named: ``each worker``, or single ones by device and node.
        free_bytes: the memory to free on each node that is named.
        max_context_tokens: the context to set; None: leave it.
    """

    kv_cache_bytes: int | None = None
    is_more_kv: bool = False
    worker_bytes: Mapping[str, int] = field(default_factory=dict)
    free_bytes: Mapping[str, int] = field(default_factory=dict)
    max_context_tokens: int | None = None


class NotEnoughMemory(FieldError):
    """A rank's weights and KV blocks do not fit where the plan puts them.

    Attributes:
        remedies: the changes that ``fix`` names, each of which is enough.
    """

    def __init__(
        self, *, field: str, value: object = None, problem: str, fix: str, remedies: tuple[Remedy, ...] = ()
    ) -> None:
        self.remedies = remedies
        super().__init__(field=field, value=value, problem=problem, fix=fix)


def shorten(value: object, limit: int = 120) -> str:
    """Returns ``repr(value)``, cut so that a message stays readable (and never carries a whole prompt)."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def cause_of(error: BaseException) -> str:
    """Describes an exception in one line: its type and the first line of its text."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
