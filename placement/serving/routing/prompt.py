"""Describes a prompt to be routed."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from placement.serving.prefix import chain_hashes


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A prompt to be routed.

    Attributes:
        token_ids: at least one.
        cache_salt: keys and values are shared among prompts of equal salt.
        reuses_prefix: whether it may take keys and values that others computed. Where its tokens are scored it may not,
            and one replica computes all of it.
        num_sequences: answers that are drawn.
        max_tokens: the most tokens of an answer; None where that is not known.
    """

    token_ids: Sequence[int]
    cache_salt: bytes = b""
    reuses_prefix: bool = True
    num_sequences: int = 1
    max_tokens: int | None = None
    _hashes: dict[int, list[bytes]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def block_hashes(self, block_size: int) -> list[bytes]:
        """Returns the hashes of its full blocks, as replicas with such blocks name them. They are computed once."""
        if block_size not in self._hashes:
            self._hashes[block_size] = chain_hashes(self.token_ids, block_size, self.cache_salt)
        return self._hashes[block_size]
