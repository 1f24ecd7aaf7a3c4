"""What is known before anything is decided: the model, the devices, the links between them."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Literal


class DType(Enum):
    """The number type that weights, activations and KV are held in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return 4 if self is DType.FLOAT32 else 2


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """Rotary position embedding (Su et al. 2021), with the scaling of Llama 3.1 where ``kind`` says so.

    Attributes:
        theta: base of the geometric series of frequencies.
        kind: ``default``, or ``llama3`` (frequencies below ``low_freq_factor`` wavelengths of the original
            context are divided by ``factor``, those above ``high_freq_factor`` kept, the rest interpolated).
        original_max_tokens: context length the model was first trained with; used by ``llama3``.
    """

    theta: float = 10_000.0
    kind: Literal["default", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_tokens: int = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A decoder-only transformer, as far as placement and execution need to know it.

    Shapes: queries ``num_heads * head_dim``, keys and values ``num_kv_heads * head_dim``; each KV head serves
    ``num_heads // num_kv_heads`` query heads (grouped-query attention, Ainslie et al. 2023).
    """

    architecture: Literal["llama"]
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    max_context_tokens: int
    rms_norm_eps: float
    rope: RopeSpec
    tied_embeddings: bool
    attention_bias: bool = False
    mlp_bias: bool = False
    eos_token_ids: tuple[int, ...] = ()

    @property
    def queries_per_kv_head(self) -> int:
        """Query heads that share one KV head (G)."""
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSpec:
    """One thing that computes: the CPU of a node, or one of its GPUs."""

    kind: Literal["cpu", "cuda"]
    index: int = 0
    memory_bytes: int
    num_threads: int = 1

    @property
    def name(self) -> str:
        """``cpu`` or ``cuda:<index>``."""
        return "cpu" if self.kind == "cpu" else f"cuda:{self.index}"


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSpec:
    """One machine."""

    name: str
    host: str
    memory_bytes: int
    devices: tuple[DeviceSpec, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSpec:
    """The path from one node to another, as measured."""

    source: str
    target: str
    latency_s: float
    bandwidth_bytes_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSpec:
    """The machines there are."""

    nodes: tuple[NodeSpec, ...]
    links: tuple[LinkSpec, ...] = field(default=())
