"""Chooses how ranks that share sequences bring queries and KV together: there are three exchanges.

Every rank has a share of the step's queries and of the KV, so each has something that the others need:

    all_gather   every rank sends its KV to all others, then attends to all of it (Llama 3; LASP-2, Sun et al. 2025)
    ring         KV goes round; a rank attends to one rank's KV while the next comes (Liu et al. 2023, Ring Attention)
    token_ring   KV stays and queries go round; each rank sends its part of the attention straight back to the rank
                 that asked, while the next queries come (Wang et al. 2024, TokenRing)

With G query heads to a KV head, a query and its answer take as many bytes as the KV of G tokens. So moving KV is best
where there is little of it, and moving queries where many tokens came before. All ranks are connected with each other,
so what goes round is sent straight to each rank in turn: that saves the latencies of passing it on, and takes no more
bytes of any link. All three add up the same numbers in the same order, so the choice changes no bit as long as all
ranks compute alike. A rank's link carries as many bytes out as in, whatever moves, so the half that TokenRing saves on
links between neighbours cannot be saved here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

TYPICAL_TOKENS = 512
"""The tokens of a typical chunk, for which people are shown the chosen exchange."""
TYPICAL_BEFORE = (0, 2048, 8192)
"""The numbers of tokens that precede typical chunks."""


class Exchange(Enum):
    """The three exchanges that the module describes."""

    ALL_GATHER = "all_gather"
    RING = "ring"
    TOKEN_RING = "token_ring"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeSpeeds:
    """The speeds that the ranks measured when they started.

    Attributes:
        latency_s: the latency of a message from one rank to another.
        bytes_per_s: the most bytes that a rank sends, or receives, in a second.
        pairs_per_s: queries times tokens that each rank attends to in a second, with all heads of a layer.
        call_s: the seconds that a rank takes to begin with another rank's part.
    """

    latency_s: float
    bytes_per_s: float
    pairs_per_s: tuple[float, ...]
    call_s: float = 1e-4

    def __str__(self) -> str:
        """Writes the speeds for logs, such as ``latency_ms=0.27 mb_per_s=194 mpairs_per_s=223,198 call_ms=0.08``."""
        pairs = ",".join(f"{1e-6 * pairs:.3g}" for pairs in self.pairs_per_s)
        link = f"latency_ms={1e3 * self.latency_s:.3g} mb_per_s={1e-6 * self.bytes_per_s:.4g}"
        return f"{link} mpairs_per_s={pairs} call_ms={1e3 * self.call_s:.3g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpectedExchange:
    """The exchange that is chosen for a chunk of a prompt.

    Attributes:
        num_tokens: tokens of the chunk.
        num_before: tokens of its sequence before it.
        way: the name of the :class:`Exchange`.
        layer_s: seconds that a layer's attention is expected to take, until the last rank is done.
    """

    num_tokens: int
    num_before: int
    way: str
    layer_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredExchange:
    """The speeds of ranks that share sequences, and the exchanges that follow from them for typical chunks."""

    speeds: ExchangeSpeeds
    expected: tuple[ExpectedExchange, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeSizes:
    """The amounts that the ranks exchange in a layer of a step.

    Attributes:
        shares: the share of all tokens that each rank has.
        num_queries: tokens that the ranks share.
        num_seen: tokens whose KV any of these attend to, sequence by sequence.
        num_pairs: pairs of a query and a token that it attends to.
        query_bytes: bytes of a query; its answer takes as many.
        kv_bytes: bytes of a token's keys and values.
    """

    shares: tuple[float, ...]
    num_queries: int
    num_seen: int
    num_pairs: int
    query_bytes: int
    kv_bytes: int


def choose(sizes: ExchangeSizes, speeds: ExchangeSpeeds, *, most_kv_tokens: int) -> Exchange:
    """Chooses the fastest exchange; of equally fast ones, the first that the module names.

    Args:
        most_kv_tokens: the most tokens whose KV may move at once.
    """
    allowed = list(Exchange) if sizes.num_seen <= most_kv_tokens else [Exchange.TOKEN_RING]
    return min(allowed, key=lambda exchange: layer_s(exchange, sizes, speeds))


def layer_s(exchange: Exchange, sizes: ExchangeSizes, speeds: ExchangeSpeeds) -> float:
    """Predicts the seconds that a layer's attention takes, until the last rank is done."""
    match exchange:
        case Exchange.ALL_GATHER:
            return _all_gather_s(sizes, speeds)
        case Exchange.RING:
            return _ring_s(sizes, speeds)
        case Exchange.TOKEN_RING:
            return _token_ring_s(sizes, speeds)


def _attend_s(sizes: ExchangeSizes, speeds: ExchangeSpeeds, rank: int, queries_of: int, kv_of: int) -> float:
    """Predicts how long ``rank`` computes the attention of one rank's queries to one rank's KV."""
    num_pairs = sizes.num_pairs * sizes.shares[queries_of] * sizes.shares[kv_of]
    return speeds.call_s + num_pairs / speeds.pairs_per_s[rank]


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
        # Answers follow the queries, in rounds too: to the rank that asked here, from the rank that was asked.
        at_s = _arrivals_s(speeds, query_bytes, rank)[-1]
        for step in range(1, num_ranks):
            to, source = (rank - step) % num_ranks, (rank + step) % num_ranks
            ready_s = max(at_s, computed_s[rank][step], computed_s[source][step])
            at_s = ready_s + speeds.latency_s + max(query_bytes[to], query_bytes[rank]) / speeds.bytes_per_s
        done_s.append(at_s)
    return max(done_s)


def _arrivals_s(speeds: ExchangeSpeeds, moved_bytes: Sequence[float], rank: int) -> list[float]:
    """Predicts when what ``rank`` receives in each round has arrived."""
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
    """Predicts when ``rank`` has computed the attention to its own part, and to what came in each round."""
    num_ranks = len(sizes.shares)
    times_s = [_attend_s(sizes, speeds, rank, rank, rank)]
    for step, arrived_s in enumerate(_arrivals_s(speeds, moved_bytes, rank), start=1):
        other = (rank - step) % num_ranks
        queries_of, kv_of = (other, rank) if moves_queries else (rank, other)
        times_s.append(max(times_s[-1], arrived_s) + _attend_s(sizes, speeds, rank, queries_of, kv_of))
    return times_s
