"""Owns the part of the cluster YAML that says who holds what: ``serving.parallelism``."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field

from orchestrator.config.source import Layers
from orchestrator.config.types import STRICT, WorkerName
from placement.errors import InvalidConfig

_Share = Annotated[float, Field(ge=0, le=1e6)]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageConfig:
    """Workers that compute a run of layers together: each a part of every layer, or all of them for some tokens."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    workers: Annotated[tuple[WorkerName, ...], Field(min_length=1, max_length=64)]
    """Names of its workers; the first of the first stage leads the replica."""
    tensor_split: Annotated[tuple[_Share, ...], Field(min_length=1, max_length=64)] | None = None
    """The share of each worker in every layer, as numbers of any scale: [3, 1] gives the first three quarters. 0 gives
    none. Default: equal shares."""
    sequence_split: Annotated[tuple[_Share, ...], Field(min_length=1, max_length=64)] | None = None
    """Instead of sharing every layer, each worker holds all of it, and the workers share every sequence: this is the
    share of each in its tokens, of which it computes the prompt's and keeps the KV. For prompts that are too long, or
    take too long, for one worker."""
    layers: Annotated[int, Field(ge=1, le=4096)] | None = None
    """How many layers. Default: dealt out evenly, the output head counted with the first stage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaConfig:
    """One complete copy of the model, cut across workers."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    stages: Annotated[tuple[StageConfig, ...], Field(min_length=1, max_length=64)]
    """Its stages, in the order of the layers."""
    role: Literal["prefill", "decode", "mixed"] | None = None
    """Whether it is for prompts, for answers to prompts of other replicas, or for both. Default: what serving.pools
    says of its workers, or both."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelismConfig:
    """Who holds what."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    replicas: Annotated[tuple[ReplicaConfig, ...], Field(min_length=1, max_length=1024)]
    """The replicas. Every worker of the cluster is in one of them."""


def check_parallelism(
    parallelism: ParallelismConfig | None, names: Sequence[str], layers: Layers
) -> list[InvalidConfig]:
    """Returns a refusal for each name of a worker that is unknown, used twice or not used, and for wrong shares.

    Args:
        parallelism: what was asked for; where it is None only the names are checked.
        names: the names of all workers.
    """
    errors: list[InvalidConfig] = []
    for name in sorted({name for name in names if names.count(name) > 1}):
        problem, fix = "is the name of more than one worker", "Give each worker a name of its own."
        errors.append(layers.refusal(("cluster", "workers"), name, problem, fix))
    if parallelism is None:
        return errors
    used: list[str] = []
    for number, replica in enumerate(parallelism.replicas):
        for index, stage in enumerate(replica.stages):
            where = ("serving", "parallelism", "replicas", number, "stages", index)
            errors += _stage_contradictions(stage, names, used, layers, where)
            used += stage.workers
    for name in names:
        if name not in used:
            problem, fix = "is in no replica of serving.parallelism", "Put it into one, or take it out of the cluster."
            errors.append(layers.refusal(("cluster", "workers"), name, problem, fix))
    return errors


def _stage_contradictions(
    stage: StageConfig, names: Sequence[str], used: Sequence[str], layers: Layers, where: tuple[str | int, ...]
) -> list[InvalidConfig]:
    errors = []
    for at, name in enumerate(stage.workers):
        place = (*where, "workers", at)
        if name not in names:
            fix = f"Use one of {', '.join(names[:8])}{', …' if len(names) > 8 else ''}."
            errors.append(layers.refusal(place, name, "is not the name of a worker", fix))
        elif name in used or name in stage.workers[:at]:
            fix = "Put each worker into one stage of one replica."
            errors.append(layers.refusal(place, name, "holds another part already", fix))
    for key, split in (("tensor_split", stage.tensor_split), ("sequence_split", stage.sequence_split)):
        if split is not None and len(split) != len(stage.workers):
            problem = f"has {len(split)} shares for {len(stage.workers)} workers"
            errors.append(layers.refusal((*where, key), list(split), problem, "Give each worker one share."))
    if stage.tensor_split is not None and stage.sequence_split is not None:
        problem = "is given, and so is tensor_split: workers share either layers or sequences"
        value = list(stage.sequence_split)
        errors.append(layers.refusal((*where, "sequence_split"), value, problem, "Leave one of them out."))
    return errors
