"""What each rank says of itself when it joins the others, and the check that all are alike where they must be. Pure.

Ranks of different targets work together, so the target is told and need not be the same. Everything else that a rank
says must be: a rank that differed there would compute another model, or would not understand the others.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from placement.errors import FieldError
from workers.transport.errors import BadFrame

MOST_BYTES = 1 << 14
"""The most bytes that a rank may say of itself."""

_SAME_VERSION = "Install the same version on all machines."
_SAME_MODEL = "Copy the model directory to all machines again."
_SAME_FILE = "Start all ranks from one cluster file."


@dataclass(frozen=True, slots=True, kw_only=True)
class _Topic:
    """Something in which ranks must be alike.

    Attributes:
        words: what a rank has, in words, with its value for ``{}``.
        fix: the thing to do where ranks differ in it.
    """

    words: str
    fix: str


TOPICS: Mapping[str, _Topic] = {
    "version": _Topic(words="version {} of heterodyne", fix=_SAME_VERSION),
    "code": _Topic(words="code of heterodyne with the digest {}", fix=_SAME_VERSION),
    "frames": _Topic(words="version {} of the frame format", fix=_SAME_VERSION),
    "sums": _Topic(words="sums by {}", fix=_SAME_VERSION),
    "model": _Topic(words="a model with the digest {}", fix=_SAME_MODEL),
    "files": _Topic(words="model files with the digest {}", fix=_SAME_MODEL),
    "tokens": _Topic(words="tokens with {}", fix=_SAME_MODEL),
    "dtype": _Topic(words="dtype {}", fix=_SAME_FILE),
    "quantization": _Topic(words="weights in the format {}", fix=_SAME_FILE),
    "limits": _Topic(words="the limits {}", fix=_SAME_FILE),
    "layout": _Topic(words="a layout of the ranks with the digest {}", fix=_SAME_FILE),
}
"""The topics by name. The first in which ranks differ is the one to tell, as it explains those that follow."""


class RanksDiffer(FieldError):
    """The ranks of a replica are not alike in something that they must have in common."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFacts:
    """What a rank says of itself.

    Attributes:
        target: what its code is generated for, such as ``avx2`` or ``cuda NVIDIA H200``.
        values: what it has, by the names of :data:`TOPICS`.
    """

    target: str
    values: Mapping[str, str]

    def pack(self) -> memoryview:
        """Returns the bytes that :meth:`unpack` reads."""
        return memoryview(json.dumps({"target": self.target, "values": dict(self.values)}).encode())

    @classmethod
    def unpack(cls, data: memoryview) -> "RankFacts":
        """Reads the bytes that :meth:`pack` returned. Raises BadFrame."""
        try:
            said = json.loads(bytes(data))
            values = {str(name): str(value) for name, value in said["values"].items()}
            return cls(target=str(said["target"]), values=values)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise BadFrame("a FACTS frame holds no facts") from error


def check_alike(ranks: Sequence[RankFacts]) -> None:
    """Checks that all ranks, in their order, are alike in every topic.

    Raises:
        RanksDiffer: they are not. Its field is the first topic in which they differ, and it names the ranks.
    """
    for name, topic in TOPICS.items():
        groups = _by_value([rank.values.get(name, "none") for rank in ranks])
        if len(groups) > 1:
            raise RanksDiffer(field=name, problem=_difference(topic, groups), fix=topic.fix)


def silent(rank: int, cause: str) -> RanksDiffer:
    """Returns the error for a rank that says nothing of itself that this version understands."""
    problem = f"rank {rank} says nothing of itself that this version of heterodyne understands ({cause})"
    return RanksDiffer(field="version", problem=problem, fix=_SAME_VERSION)


def _by_value(values: Sequence[str]) -> dict[str, list[int]]:
    """Groups ranks by what they have; the group of rank 0 comes first."""
    groups: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        groups.setdefault(value, []).append(rank)
    return groups


def _difference(topic: _Topic, groups: Mapping[str, Sequence[int]]) -> str:
    """Says who has what: first the ranks that differ from rank 0, and last those that are like it."""
    (first, like_first), *others = groups.items()
    (value, ranks), *more = others
    words = [f"{_ranks(ranks)} {topic.words.format(value)}"]
    return ", ".join([*words, *(f"{_ranks(each)} {value}" for value, each in more), f"{_ranks(like_first)} {first}"])


def _ranks(ranks: Sequence[int]) -> str:
    """Names some ranks, with the verb."""
    if len(ranks) == 1:
        return f"rank {ranks[0]} has"
    *most, last = map(str, ranks)
    return f"ranks {', '.join(most)} and {last} have"
