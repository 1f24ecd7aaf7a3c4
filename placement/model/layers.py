"""Describes one layer of a model: its attention, its feed-forward, and the state that it keeps of a sequence."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedState:
    """State that a layer keeps of every token of a sequence, in KV blocks: a key and a value [KV heads, D] each.

    Attributes:
        num_kv_heads: KV heads whose state is kept.
        head_dim: numbers of a key, and of a value (D).
    """

    num_kv_heads: int
    head_dim: int

    @property
    def elements_per_token(self) -> int:
        """Counts the numbers that are kept of a token."""
        return 2 * self.num_kv_heads * self.head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class Gqa:
    """Grouped-query attention (Ainslie et al. 2023): each KV head serves ``num_heads // num_kv_heads`` query heads.

    Attributes:
        num_heads: query heads.
        num_kv_heads: KV heads.
        head_dim: numbers of a query, a key and a value (D).
        window: the most tokens, up to and with itself, that a token attends to; None: all.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None = None

    def state(self, num_kv_heads: int) -> PagedState:
        """Returns what a rank that holds ``num_kv_heads`` of the layer's KV heads keeps."""
        assert 0 <= num_kv_heads <= self.num_kv_heads, (num_kv_heads, self)
        return PagedState(num_kv_heads=num_kv_heads, head_dim=self.head_dim)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dense:
    """A gated feed-forward: down(activation(gate(x)) * up(x)).

    Attributes:
        size: columns of the gate and of the up projection (F).
    """

    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """A decoder layer. Attentions and feed-forwards of other kinds become further members of these two types."""

    attention: Gqa
    ffn: Dense
