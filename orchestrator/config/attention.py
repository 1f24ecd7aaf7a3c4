"""Owns the section ``serving.attention`` of the cluster YAML: who holds keys and values for others, and attends."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field, JsonValue

from orchestrator.config.types import STRICT, ByteSize, WorkerName, parse_bytes
from placement.planning.residency import Partition


def _or_auto(schema: dict[str, JsonValue]) -> None:
    """Adds ``auto`` to a schema, where it stands for None."""
    either = schema["anyOf"]
    assert isinstance(either, list), schema
    either.append({"const": "auto"})


_NoneOrSize = Annotated[
    int,
    Field(ge=0, le=2**50),
    BeforeValidator(parse_bytes, json_schema_input_type=int | str),
    Field(examples=[0, "256MiB"]),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionConfig:
    """Attention workers: they hold the keys and values of replicas that answer. workers, node_labels or both select
    them."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    workers: Annotated[tuple[WorkerName, ...], Field(max_length=64)] = ()
    """Names of workers; the name of a worker with a count stands for all of them. They are in no replica."""
    node_labels: Mapping[str, str] = field(default_factory=dict)
    """Selects the workers whose own node_labels have all of these."""
    offload: Literal["auto", "always"] = "auto"
    """auto: only where more tokens a second are expected with them than without; else they stay idle, and plan and
    status say why. always: whatever is expected."""
    partition: Literal["auto", "kv_heads", "requests", "token_ranges"] = "auto"
    """How attention is divided among them: each has some KV heads of all sequences, all heads of some sequences, or
    some tokens of each block. auto: whichever is expected to be fastest."""
    kv_cache: Annotated[ByteSize | None, Field(json_schema_extra=_or_auto)] = None
    """Memory for KV blocks on each of them, for all replicas together. Default, auto: half of what is left there on a
    CPU, nine tenths of that on a GPU, or 256 MiB where the memory is not known; at most what sequences can use."""
    local_kv_cache: _NoneOrSize = 0
    """Memory for KV blocks that each rank of the model keeps itself: sequences go there first, and to attention workers
    once it is full."""
    q_first: Literal["auto"] | bool = "auto"
    """Whether queries go to attention workers ahead of keys and values, so that they can begin. auto: yes."""
    staggered: bool = True
    """Whether steps of several sequences are computed in two halves, one while the attention of the other is on its
    way."""
    typical_context: Annotated[int, Field(ge=1, le=2**27)] | None = None
    """Tokens of a typical sequence midway through its answer, by which offload: auto and partition: auto decide.
    Default: half of the context that is served."""
    link_speed: ByteSize | None = None
    """Bytes a second that the network interface of each worker carries, both ways together. Default, as it is not
    measured: 1.25GB is assumed between machines, and 4GB within one."""

    @property
    def asked_partition(self) -> Partition | None:
        """Returns the partition that is asked for; None: whichever suits."""
        return None if self.partition == "auto" else Partition(self.partition)
