"""Describes what is known before anything is decided: the model and the machines."""

from dataclasses import dataclass
from enum import Enum
from typing import Literal

from placement.model.layers import Dense, Gqa, LayerSpec

Architecture = Literal["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3_text"]
Activation = Literal["silu", "gelu_tanh"]


class DType(Enum):
    """The number type of weights, activations and KV."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"

    @property
    def itemsize(self) -> int:
        """Returns the bytes of one element."""
        return 4 if self is DType.FLOAT32 else 2


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """A rotary position embedding (Su et al. 2021), and how its frequencies are stretched to longer contexts.

    Attributes:
        theta: the base of the geometric series of frequencies.
        kind: how the frequencies are stretched. ``default`` leaves them as they are. ``linear`` divides all of them by
            ``factor`` (Chen et al. 2023). ``llama3`` divides those that make fewer than ``low_freq_factor`` turns in
            the original context, keeps those that make more than ``high_freq_factor``, and interpolates between
            (Llama 3.1). ``yarn`` does the same between ``beta_slow`` and ``beta_fast`` turns, but interpolates over the
            index of the frequency (Peng et al. 2023).
        original_max_tokens: the context length that the model was first trained with, for ``llama3`` and ``yarn``.
        truncate: whether ``yarn`` widens the interpolated range to whole indices.
        attention_factor: the factor by which ``yarn`` multiplies the rotated queries and the rotated keys.
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
        architecture: the name of the family, for people; the fields below say what the layers do.
        local_rope: the rotary embedding of the layers with a window, where it is not ``rope``.
        windows: for each layer, the most tokens, up to and with itself, that a token attends to; None: all. The tuple
            is empty where no layer has a window.
        attention_scale: the factor of the attention scores; None: ``head_dim ** -0.5``.
        qk_norm: whether each head's query and key are RMS-normed before they are rotated.
        post_norms: whether the outputs of attention and feed-forward are normed before they are added to the residual.
        unit_offset_norms: whether norms multiply by ``1 + weight``, in float32, and not by ``weight``.
        ladder: whether the output of each attention or feed-forward is added to the residual one of them later, so that
            its all-reduce can take as long as the next one computes (Zhang et al. 2025, Ladder-residual).
        embedding_scale: the factor of the embedding's rows, rounded to their number type.
        activation: the activation of the gate; ``gelu_tanh`` is GELU by its tanh approximation.
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
        """Counts the query heads that share one KV head (G)."""
        return self.num_heads // self.num_kv_heads

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        """Describes each layer, first layer first."""
        return tuple(
            LayerSpec(
                attention=Gqa(
                    num_heads=self.num_heads,
                    num_kv_heads=self.num_kv_heads,
                    head_dim=self.head_dim,
                    window=self.windows[layer] if self.windows else None,
                ),
                ffn=Dense(size=self.ffn_size),
            )
            for layer in range(self.num_layers)
        )

    @property
    def distinct_windows(self) -> tuple[int | None, ...]:
        """Lists each window that some layer has once; ``(None,)`` where no layer has one."""
        return tuple(dict.fromkeys(self.windows)) or (None,)

    def rope_of(self, window: int | None) -> RopeSpec:
        """Returns the rotary embedding of the layers with that window."""
        return self.rope if window is None or self.local_rope is None else self.local_rope


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSpec:
    """A device that computes: the CPU of a node, or one of its GPUs.

    Attributes:
        memory_bytes: the memory that its worker may use; None where it is not known, as that of a GPU is not before
            its worker runs.
        worker: what the configuration calls the worker that computes on it; empty where nobody calls it anything.
        target: what code is generated for there, such as ``avx2``; empty where that is not known.
    """

    kind: Literal["cpu", "cuda"]
    index: int = 0
    memory_bytes: int | None
    num_threads: int = 1
    worker: str = ""
    target: str = ""

    @property
    def name(self) -> str:
        """Returns ``cpu`` or ``cuda:<index>``."""
        return "cpu" if self.kind == "cpu" else f"cuda:{self.index}"


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSpec:
    """A machine and its devices.

    Attributes:
        memory_bytes: the memory that ranks on its CPU share; None where it is not known. A CPU whose own
            ``memory_bytes`` are as many has no limit of its own.
    """

    name: str
    memory_bytes: int | None
    devices: tuple[DeviceSpec, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSpec:
    """The machines of a deployment."""

    nodes: tuple[NodeSpec, ...]
