"""An engine over two hosts in one or more layouts, and the figures that it reaches.

An engine is loaded once in each layout: each way of dividing the model between the hosts. All are frozen but the one
that measures, so that an engine lives on while its caller changes the links and measures others.

What is counted is :class:`engine_cases.Case`'s, for all engines alike. A prefill is one prompt, from its arrival until
its first token is there. A decode starts when every sequence has its first token; then every step takes the most likely
token of each and feeds it back. Loading, the memory of a context and the prompts of a decode are in no figure.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tests.benchmarks.engine.engine_cases import Case
from tests.benchmarks.engine.engine_peers import PeerFailed
from tests.benchmarks.engine.spread_peer import SpreadPeer
from tests.benchmarks.report import Metric, median

UNIT = "tokens/s"

_Layout = TypeVar("_Layout")


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What is measured under one condition of the links.

    Attributes:
        batches: sequences of each decode.
        prompts: tokens of each prefill.
        num_steps: of each decode.
        context: tokens of each prompt of a decode.
        repeats: samples of each case and layout; layouts take turns.
    """

    batches: Sequence[int] = (1, 8)
    prompts: Sequence[int] = (128, 512)
    num_steps: int = 16
    context: int = 64
    repeats: int = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Tokens per second in one case.

    Attributes:
        layout: whose median is highest.
        samples: of each layout, in the order in which they were taken.
    """

    layout: str
    samples: Mapping[str, tuple[float, ...]]

    @property
    def metric(self) -> Metric:
        """The best layout's median."""
        return median(self.samples[self.layout], UNIT)


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerFigures:
    """What an engine reached.

    Attributes:
        decode: by the number of sequences.
        prefill: by the number of tokens.
        left_out: layouts that could not be loaded, with the reason.
    """

    engine: str
    decode: Mapping[int, Rates]
    prefill: Mapping[int, Rates]
    versions: Mapping[str, str] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unavailable:
    """Why an engine was not measured, in one line."""

    engine: str
    reason: str


class Engine:
    """A loaded engine over two hosts, in one or more layouts.

    Args:
        peers: by layout, at least one.
        left_out: layouts that could not be loaded, with the reason.
    """

    def __init__(self, name: str, peers: Mapping[str, SpreadPeer], *, left_out: Mapping[str, str]) -> None:
        assert peers, left_out
        self.name = name
        self.left_out = left_out
        self._peers = dict(peers)

    @property
    def layouts(self) -> tuple[str, ...]:
        """Those that are measured."""
        return tuple(self._peers)

    @property
    def versions(self) -> Mapping[str, str]:
        """What it says it runs."""
        return next(iter(self._peers.values())).versions

    def decode(self, *, batch: int, steps: int, context: int = 64, repeats: int = 3) -> Rates:
        """Steps of ``batch`` sequences, each ``context`` tokens deep at first. Raises PeerFailed."""
        return self._rates(Case(phase="decode", num_tokens=context, num_sequences=batch, num_steps=steps), repeats)

    def prefill(self, *, tokens: int, repeats: int = 3) -> Rates:
        """One prompt. Raises PeerFailed."""
        return self._rates(Case(phase="prefill", num_tokens=tokens, num_sequences=1), repeats)

    def figures(self, work: Work) -> PeerFigures:
        """All of ``work``. Raises PeerFailed."""
        taken: dict[str, Any] = {"repeats": work.repeats}
        steps: dict[str, Any] = {"steps": work.num_steps, "context": work.context}
        return PeerFigures(
            engine=self.name,
            decode={batch: self.decode(batch=batch, **steps, **taken) for batch in work.batches},
            prefill={tokens: self.prefill(tokens=tokens, **taken) for tokens in work.prompts},
            versions=self.versions,
            left_out=self.left_out,
        )

    def measure(self, work: Work) -> PeerFigures | Unavailable:
        """:meth:`figures`, or why there are none."""
        try:
            return self.figures(work)
        except PeerFailed as error:
            return Unavailable(engine=self.name, reason=str(error))

    def narrow(self, layouts: Sequence[str]) -> None:
        """End all other layouts; what the first condition of the links has shown to be slow need not be measured on."""
        for layout in [one for one in self._peers if one not in layouts]:
            self._peers.pop(layout).close()
        assert self._peers, layouts

    def close(self) -> None:
        """End all."""
        for peer in self._peers.values():
            peer.close()

    def _rates(self, case: Case, repeats: int) -> Rates:
        samples: dict[str, list[float]] = {layout: [] for layout in self._peers}
        for seed in range(repeats):
            for layout, peer in self._peers.items():
                samples[layout].append(peer.measure(case, seed).rate)
        return best({layout: tuple(rates) for layout, rates in samples.items()})


def best(samples: Mapping[str, tuple[float, ...]]) -> Rates:
    """The layout with the highest median, the first of them where there are several."""
    return Rates(layout=max(samples, key=lambda layout: median(samples[layout], UNIT).value), samples=samples)


def best_layouts(figures: PeerFigures) -> tuple[str, ...]:
    """Those that are best in any case, for :meth:`Engine.narrow`."""
    rates = (*figures.decode.values(), *figures.prefill.values())
    return tuple(dict.fromkeys(one.layout for one in rates))


def loaded(peer: SpreadPeer, **settings: Any) -> SpreadPeer:
    try:
        peer.load(**settings)
    except BaseException:
        peer.close()
        raise
    return peer


@contextmanager
def engine(name: str, layouts: Mapping[str, _Layout], start: Callable[[int, _Layout], SpreadPeer]) -> Iterator[Engine]:
    """The layouts that can be loaded. Raises PeerFailed where there is none."""
    peers: dict[str, SpreadPeer] = {}
    left_out: dict[str, str] = {}
    try:
        for number, (label, layout) in enumerate(layouts.items()):
            try:
                peers[label] = start(number, layout)
            except PeerFailed as error:
                left_out[label] = str(error)
        if not peers:
            raise PeerFailed("; ".join(f"{label}: {reason}" for label, reason in left_out.items()))
        yield Engine(name, peers, left_out=left_out)
    finally:
        for peer in peers.values():
            peer.close()
