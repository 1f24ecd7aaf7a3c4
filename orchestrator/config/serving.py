"""Owns the section ``serving`` of the cluster YAML: how replicas run their sequences, and what each is for."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field, JsonValue

from orchestrator.config.attention import AttentionConfig
from orchestrator.config.parallelism import ParallelismConfig
from orchestrator.config.pools import PoolsConfig
from orchestrator.config.source import Layers
from orchestrator.config.types import STRICT, ByteSize
from placement.serving.kv.peers import KvFormat


def _or_auto(schema: dict[str, JsonValue]) -> None:
    """Adds ``auto`` to a schema, where it stands for None: see :func:`expand_auto`."""
    either = schema["anyOf"]
    assert isinstance(either, list), schema
    either.append({"const": "auto"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingConfig:
    """How a replica runs its sequences."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    max_num_seqs: Annotated[int, Field(ge=1, le=4096)] = 32
    """Most sequences that run at once in a replica."""
    token_budget: Annotated[int | None, Field(ge=1, le=2**20, json_schema_extra=_or_auto)] = None
    """Most tokens of one step, decodes counted. More: answers start sooner; fewer: they stream smoother. Default, auto:
    each replica measures its steps when it starts, and takes the largest budget whose step lasts step_time_s at the
    most; at least max_num_seqs, and at most 512, or 2048 where all devices are GPUs."""
    step_time_s: Annotated[float, Field(ge=0.001, le=60)] = 0.5
    """Longest time that a step is to take, by which token_budget: auto sizes steps; a running answer gets a token with
    each. It is measured with short sequences: behind long contexts steps take longer. A token_budget that is set does
    without it."""
    block_size: Annotated[int, Field(ge=1, le=1024)] = 16
    """Tokens of one KV block."""
    kv_cache: Annotated[ByteSize | None, Field(json_schema_extra=_or_auto)] = None
    """Memory for KV blocks in each rank. Default, auto: half of the memory that weights, workspace and process leave on
    a CPU, nine tenths of that on a GPU, or 256 MiB where the memory is not known; at most what max_num_seqs sequences
    can use, and at least 2048 tokens, or model.max_context_tokens where that is set. On a CPU memory is taken as it is
    used, and other programs see the rest as free: set a size where they, or another serve, need memory too."""
    parallelism: Annotated[ParallelismConfig | None, Field(json_schema_extra=_or_auto)] = None
    """Who holds what of the model. Default, auto: every worker all of it, or where that does not fit, all workers
    together one replica, by measured speed within memory: those of a node share every layer, nodes share the layers."""
    prefix_cache: bool = True
    """Whether the KV of prompts and answers that ended is kept, for as long as there is room, for prompts that begin
    alike."""
    disaggregation: Literal["auto", "never", "always"] = "auto"
    """Whether one replica may compute a prompt and another its answer; the keys and values then go over the network.
    auto: where that is expected to be clearly faster, with pools or without; always: for every prompt of more than a
    block, which needs a prefill pool; never: each replica computes both, and there are no pools."""
    kv_transfer: Literal["model", "int8"] = "model"
    """How keys and values are written on the way from one replica to another. model: in the number type that they are
    kept in; int8: in 8 bits, which is less to send, and gives slightly other answers."""
    pools: PoolsConfig | None = None
    """Which workers are for prompts, and which for answers. Default: every replica is for both, unless
    serving.parallelism gives it a role."""
    attention: AttentionConfig | None = None
    """Workers that hold keys and values and attend to them, and compute nothing else of the model. Default: none."""

    @property
    def kv_format(self) -> KvFormat:
        """Returns how keys and values are written between replicas."""
        return KvFormat.INT8 if self.kv_transfer == "int8" else KvFormat.NATIVE


def expand_auto(layers: Layers) -> None:
    """Replaces the word ``auto`` by None, which stands for it, for each key that has it."""
    serving = layers.values.get("serving")
    if not isinstance(serving, dict):
        return
    if serving.get("kv_cache") == "auto":
        serving["kv_cache"] = None
    attention = serving.get("attention")
    if isinstance(attention, dict) and attention.get("kv_cache") == "auto":
        attention["kv_cache"] = None
    others = {
        "token_budget": ("is neither auto nor a whole number", "Write auto, or a number without quotes or unit."),
        "parallelism": ("is neither auto nor a section", "Write auto, or replicas: with the stages of each."),
    }
    for key, (problem, fix) in others.items():
        if isinstance(said := serving.get(key), str):
            if said != "auto":
                layers.errors.append(layers.refusal(("serving", key), said, problem, fix))
            serving[key] = None
