"""How queries meet the KV that other ranks hold, where ranks share sequences: the ways there are, and which is fastest.

Every rank has its share of the step's queries and of the KV, so each has something that the others need:

    all_gather   every rank sends its KV to all, then attends to all of it (Llama 3's; LASP-2, Sun et al. 2025)
    ring         KV goes round; a rank attends to one rank's while the next comes (Liu et al. 2023, Ring Attention)
    token_ring   KV stays; queries go round; what KV answers goes straight back to who asked, while the next
                 queries come (Wang et al. 2024, TokenRing)

With G query heads to a KV head a query and its answer take as many bytes as the KV of G tokens: KV moves where there is
little of it, queries where many tokens came before. All ranks are connected with each other, so what goes round is sent
straight to each in turn, which spares the latencies of passing it on and takes no more bytes of anybody's link. What is
added up, and its order, is the same in all three: the choice changes no bit, as long as all ranks compute alike. A
rank's own link then carries as much out
as in, whatever moves, so that the halves that TokenRing saves on links between neighbours are not to be had here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

TYPICAL_TOKENS = 512
"""Of a chunk that people are told the exchange of."""
TYPICAL_BEFORE = (0, 2048, 8192)
"""Tokens before such chunks."""


class Exchange(Enum):
    """A way to exchange."""

    ALL_GATHER = "all_gather"
    RING = "ring"
    TOKEN_RING = "token_ring"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeSpeeds:
    """What was measured when the ranks started.

    Attributes:
        latency_s: of a message from one rank to another.
        bytes_per_s: that a rank sends, or receives, at the most.
        pairs_per_s: queries times tokens that each rank attends to in a second, of all heads of a layer.
        call_s: that a rank takes to begin with another's part.
    """

    latency_s: float
    bytes_per_s: float
    pairs_per_s: tuple[float, ...]
    call_s: float = 1e-4

    def __str__(self) -> str:
        """``latency_ms=0.27 mb_per_s=194 mpairs_per_s=223,198 call_ms=0.08``"""
        pairs = ",".join(f"{1e-6 * pairs:.3g}" for pairs in self.pairs_per_s)
        link = f"latency_ms={1e3 * self.latency_s:.3g} mb_per_s={1e-6 * self.bytes_per_s:.4g}"
        return f"{link} mpairs_per_s={pairs} call_ms={1e3 * self.call_s:.3g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpectedExchange:
    """What is chosen for a chunk of a prompt.

    Attributes:
        num_tokens: of the chunk.
        num_before: tokens of its sequence before it.
        way: the name of an :class:`Exchange`.
        layer_s: what a layer's attention is expected to take, at the rank that is done last.
    """

    num_tokens: int
    num_before: int
    way: str
    layer_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredExchange:
    """What the ranks that share sequences measured, and what comes of it for typical chunks."""

    speeds: ExchangeSpeeds
    expected: tuple[ExpectedExchange, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeSizes:
    """What a layer of a step is to exchange.

    Attributes:
        shares: of each rank in all tokens.
        num_queries: tokens that the ranks share.
        num_seen: tokens whose KV any of these see, sequence by sequence.
        num_pairs: queries times tokens that they see.
        query_bytes: of a query; its answer takes as many.
        kv_bytes: of a token's keys and values.
    """

    shares: tuple[float, ...]
    num_queries: int
    num_seen: int
    num_pairs: int
    query_bytes: int
    kv_bytes: int


def choose(sizes: ExchangeSizes, speeds: ExchangeSpeeds, *, most_kv_tokens: int) -> Exchange:
    """The fastest; of equals the first that the module names.

    Args:
        most_kv_tokens: no more than so many tokens' KV may move at once.
    """
    ways = list(Exchange) if sizes.num_seen <= most_kv_tokens else [Exchange.TOKEN_RING]
    return min(ways, key=lambda way: layer_s(way, sizes, speeds))


def layer_s(way: Exchange, sizes: ExchangeSizes, speeds: ExchangeSpeeds) -> float:
    """What a layer's attention is expected to take, at the rank that is done last."""
    match way:
        case Exchange.ALL_GATHER:
            return _all_gather_s(sizes, speeds)
        case Exchange.RING:
            return _ring_s(sizes, speeds)
        case Exchange.TOKEN_RING:
            return _token_ring_s(sizes, speeds)


def _attend_s(sizes: ExchangeSizes, speeds: ExchangeSpeeds, at: int, queries_of: int, kv_of: int) -> float:
    num_pairs = sizes.num_pairs * sizes.shares[queries_of] * sizes.shares[kv_of]
    return speeds.call_s + num_pairs / speeds.pairs_per_s[at]


def _all_gather_s(sizes: ExchangeSizes, speeds: ExchangeSpeeds) -> float:
    ranks = range(len(sizes.shares))
    kv_bytes = [sizes.kv_bytes * sizes.num_seen * share for share in sizes.shares]
    busiest = max(max(sum(kv_bytes) - kv_bytes[rank], (len(ranks) - 1) * kv_bytes[rank]) for rank in ranks)
    gathered_s = speeds.latency_s + busiest / speeds.bytes_per_s
    done_s = []
    for rank in ranks:
        rest_s = sum(_attend_s(sizes, speeds, rank, rank, other) for other in ranks if other != rank)
        done_s.append(max(gathered_s, _attend_s(sizes, speeds, rank, rank, rank)) + rest_s)
    return max(done_s)


def _ring_s(sizes: ExchangeSizes, speeds: ExchangeSpeeds) -> float:
    kv_bytes = [sizes.kv_bytes * sizes.num_seen * share for share in sizes.shares]
    return max(_rounds_s(sizes, speeds, kv_bytes, rank, moves_queries=False)[-1] for rank in range(len(sizes.shares)))


def _token_ring_s(sizes: ExchangeSizes, speeds: ExchangeSpeeds) -> float:
    num_ranks = len(sizes.shares)
    query_bytes = [sizes.query_bytes * sizes.num_queries * share for share in sizes.shares]
    computed_s = [_rounds_s(sizes, speeds, query_bytes, rank, moves_queries=True) for rank in range(num_ranks)]
    done_s = []
    for rank in range(num_ranks):
        # Answers go behind the queries, in rounds too: to who asked here, from who was asked.
        at_s = _arrivals_s(speeds, query_bytes, rank)[-1]
        for step in range(1, num_ranks):
            to, source = (rank - step) % num_ranks, (rank + step) % num_ranks
            ready_s = max(at_s, computed_s[rank][step], computed_s[source][step])
            at_s = ready_s + speeds.latency_s + max(query_bytes[to], query_bytes[rank]) / speeds.bytes_per_s
        done_s.append(at_s)
    return max(done_s)


def _arrivals_s(speeds: ExchangeSpeeds, moved_bytes: Sequence[float], rank: int) -> list[float]:
    """When what comes in each round is there."""
    num_ranks, at_s = len(moved_bytes), 0.0
    arrivals_s = []
    for step in range(1, num_ranks):
        largest = max(moved_bytes[rank], moved_bytes[(rank - step) % num_ranks])
        at_s += speeds.latency_s + largest / speeds.bytes_per_s
        arrivals_s.append(at_s)
    return arrivals_s


def _rounds_s(
    sizes: ExchangeSizes, speeds: ExchangeSpeeds, moved_bytes: Sequence[float], rank: int, *, moves_queries: bool
) -> list[float]:
    """When a rank has attended with its own, and with what came in each round."""
    num_ranks = len(sizes.shares)
    times_s = [_attend_s(sizes, speeds, rank, rank, rank)]
    for step, arrived_s in enumerate(_arrivals_s(speeds, moved_bytes, rank), start=1):
        other = (rank - step) % num_ranks
        queries_of, kv_of = (other, rank) if moves_queries else (rank, other)
        times_s.append(max(times_s[-1], arrived_s) + _attend_s(sizes, speeds, rank, queries_of, kv_of))
    return times_s
