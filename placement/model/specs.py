"""What is known before anything is decided: the model, the devices, the links between them."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

Architecture = Literal["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3_text"]
Activation = Literal["silu", "gelu_tanh"]


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
    """Rotary position embedding (Su et al. 2021), and how its frequencies are stretched to longer contexts.

    Attributes:
        theta: base of the geometric series of frequencies.
        kind: ``default``: as they are; ``linear``: all divided by ``factor`` (Chen et al. 2023); ``llama3``: those
            below ``low_freq_factor`` turns in the original context divided, those above ``high_freq_factor`` kept,
            the rest interpolated (Llama 3.1); ``yarn``: likewise between ``beta_slow`` and ``beta_fast`` turns, but
            interpolated over the index of the frequency (Peng et al. 2023).
        original_max_tokens: context length the model was first trained with; used by ``llama3`` and ``yarn``.
        truncate: whether ``yarn`` widens the interpolated range to whole indices.
        attention_factor: factor of the rotated queries and of the rotated keys; of ``yarn``.
    """

    theta: float = 10_000.0
    kind: Literal["default", "linear", "llama3", "yarn"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_tokens: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A decoder-only transformer, as far as placement and execution need to know it.

    Shapes: queries ``num_heads * head_dim``, keys and values ``num_kv_heads * head_dim``; each KV head serves
    ``num_heads // num_kv_heads`` query heads (grouped-query attention, Ainslie et al. 2023).

    Attributes:
        architecture: the family's name. For people: what the layers do is said by the fields below.
        local_rope: rope of the layers with a window, where it is not ``rope``.
        windows: how many tokens up to and with itself a token attends to, for each layer; None: all. Empty: none
            of the layers has a window.
        attention_scale: factor of the attention scores; None: ``head_dim ** -0.5``.
        qk_norm: each head's query and key are RMS-normed before they are rotated.
        post_norms: what attention and feed-forward give is normed again before it is added to the residual.
        unit_offset_norms: norms multiply by ``1 + weight``, in float32, where others multiply by ``weight``.
        ladder: what an attention or feed-forward gives is added to the residual one of them later, so that its sum
            over ranks has the time of the next to be done (Zhang et al. 2025, Ladder-residual).
        embedding_scale: factor of the embedding's rows, rounded to their number type.
        activation: of the gate; ``gelu_tanh`` is GELU by its tanh approximation.
    """

    architecture: Architecture
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
    local_rope: RopeSpec | None = None
    windows: tuple[int | None, ...] = ()
    attention_scale: float | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    ladder: bool = False
    unit_offset_norms: bool = False
    embedding_scale: float = 1.0
    activation: Activation = "silu"
    tied_embeddings: bool
    eos_token_ids: tuple[int, ...] = ()

    @property
    def queries_per_kv_head(self) -> int:
        """Query heads that share one KV head (G)."""
        return self.num_heads // self.num_kv_heads

    @property
    def distinct_windows(self) -> tuple[int | None, ...]:
        """Each window that some layer has, once; ``(None,)`` where none has one."""
        return tuple(dict.fromkeys(self.windows)) or (None,)

    def window_of(self, layer: int) -> int | None:
        """The window of a layer; None where it attends to all tokens."""
        return self.windows[layer] if self.windows else None

    def rope_of(self, window: int | None) -> RopeSpec:
        """The rotary embedding of the layers with that window."""
        return self.rope if window is None or self.local_rope is None else self.local_rope


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
    """The machines there are.

    Attributes:
        links: nothing fills or reads them yet; the cost model that plans for slow links (issue 18) does both.
    """

    nodes: tuple[NodeSpec, ...]
    links: tuple[LinkSpec, ...] = field(default=())
