"""Holds what was decided about offloading attention, and says it in a sentence with its numbers."""

from dataclasses import dataclass
from enum import Enum

from placement.planning.memory import format_bytes


class Refusal(Enum):
    """Why attention is not offloaded."""

    WEIGHTS = "weights"
    """The model workers cannot hold the weights."""
    NO_ROOM = "no room"
    """The attention workers cannot hold the keys and values of one sequence."""
    LINKS = "links"
    """A network interface is too slow, for any sequence or for as many as would pay."""
    LOSES = "loses"
    """It would serve fewer tokens a second, or hardly more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Describes what decodes are expected to be like.

    Attributes:
        num_sequences: the sequences of all micro-batches: the largest batch.
        num_micro_batches: how many micro-batches they are divided into.
        step_s: seconds until each of them has a token more.
    """

    num_sequences: int
    num_micro_batches: int
    step_s: float

    @property
    def tokens_per_s(self) -> float:
        """Returns the tokens that all sequences together get in a second."""
        return self.num_sequences / self.step_s if self.num_sequences else 0.0

    def __str__(self) -> str:
        """Writes the prediction for people, such as ``836 sequences at 14,145 tokens/s in steps of 59.1 ms``."""
        batches = f" in {self.num_micro_batches} micro-batches" if self.num_micro_batches > 1 else ""
        rate = f"{self.tokens_per_s:,.0f}" if self.tokens_per_s >= 100 else f"{self.tokens_per_s:.3g}"
        return f"{self.num_sequences} sequences{batches} at {rate} tokens/s in steps of {1e3 * self.step_s:.3g} ms"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The decision about offloading attention.

    Attributes:
        refusal: why it is refused; None: it is accepted.
        alone, offloaded: what is expected without and with it.
        gain: the share by which it serves more tokens a second; infinite where without it nothing fits.
        context: the tokens of a sequence that all of this holds for.
        num_fitting: sequences that fit into the attention workers' memory, whether or not the links carry as many.
        needed_bytes_per_s: what each network interface must carry (minBW): those of the model workers of a replica, and
            then those of the attention workers.
        links_bytes_per_s: what each of them carries.
        needed_bytes, available_bytes: the memory that is too little, where weights or one sequence do not fit.
    """

    refusal: Refusal | None
    alone: Prediction
    offloaded: Prediction
    gain: float
    context: int
    num_fitting: int
    needed_bytes_per_s: tuple[float, ...]
    links_bytes_per_s: tuple[float, ...]
    needed_bytes: int = 0
    available_bytes: int = 0

    @property
    def is_accepted(self) -> bool:
        """Tells whether attention is offloaded."""
        return self.refusal is None

    @property
    def reason(self) -> str:
        """Says the decision in a sentence, with the numbers that led to it."""
        match self.refusal:
            case Refusal.WEIGHTS:
                return f"attention is not offloaded: the weights take {self._memory} of the model workers"
            case Refusal.NO_ROOM:
                return (
                    f"attention is not offloaded: the keys and values of one sequence of {self.context} tokens take "
                    f"{self._memory} of the attention workers, each of which needs its share"
                )
            case Refusal.LINKS if not self.offloaded.num_sequences:
                return f"attention is not offloaded: {self._links}, with one sequence of {self.context} tokens"
            case Refusal.LINKS | Refusal.LOSES:
                return f"attention is not offloaded: {self._compared}; {self._links}"
            case None:
                return f"attention is offloaded: {self._compared}; {self._links}"

    @property
    def _memory(self) -> str:
        return f"{format_bytes(self.needed_bytes)} of the {format_bytes(self.available_bytes)}"

    @property
    def _compared(self) -> str:
        if not self.alone.num_sequences:
            return f"with it are served {self.offloaded}, and without it not one sequence of {self.context} tokens fits"
        change = f"{abs(self.gain):.1%} {'more' if self.gain >= 0 else 'fewer'} tokens/s"
        return f"with {self.context} tokens each, {self.offloaded} are {change} than {self.alone} without it"

    @property
    def _links(self) -> str:
        """Names the link that comes nearest to its limit, or exceeds it most."""
        pairs = list(zip(self.needed_bytes_per_s, self.links_bytes_per_s, strict=True))
        need, link = max(pairs, key=lambda pair: pair[0] / pair[1])
        amount = f"{need / 1e9:.3g} GB/s of its {link / 1e9:.3g} GB/s"
        if need > link:
            return f"the busiest link would need {amount}"
        if self.offloaded.num_sequences < self.num_fitting:
            return f"{self.num_fitting} would fit, but the links carry no more; the busiest needs {amount}"
        return f"the busiest link needs {amount}"
