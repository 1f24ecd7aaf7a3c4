"""Learns how fast a replica computes prompts and answers from the steps that it has run.

A step takes a time that does not depend on its size, such as for reading the weights, and a time for each token. Both
are fitted to the last steps, separately for steps without prompts and for those with prompts, as there are many more of
the former and they would soon displace the latter.
"""

from dataclasses import dataclass, field, replace

from placement.serving.step_plan import StepLoad

_KEPT = 0.95
"""The weight that a measurement keeps with each later one, so that about the last twenty count."""
_LEAST_SPREAD = 1e-3
"""Below this ratio of variance to squared mean, sizes are too alike to tell the fixed time from that of tokens."""
_PRIOR_TOKENS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class LineFit:
    """A time that grows with a number of tokens along a line, by least squares over what was measured.

    Neither the fixed time nor that of a token is ever negative. Where all measurements are of one size, all time counts
    as time of the tokens.

    Attributes:
        weight: how many measurements count, with older ones counted less; 0: nothing is known.
        tokens: the weighted sum of tokens; the others are of seconds, of squared tokens, and of tokens times seconds.
        token_s: seconds that one more token takes; 0 where nothing is known.
        fixed_s: seconds that do not depend on the tokens; 0 where nothing is known.
    """

    weight: float = 0.0
    tokens: float = 0.0
    seconds: float = 0.0
    squares: float = 0.0
    products: float = 0.0
    token_s: float = field(init=False, compare=False, default=0.0)
    fixed_s: float = field(init=False, compare=False, default=0.0)

    def after(self, num_tokens: int, seconds: float) -> "LineFit":
        """Returns the fit with one more measurement."""
        return LineFit(
            weight=_KEPT * self.weight + 1.0,
            tokens=_KEPT * self.tokens + num_tokens,
            seconds=_KEPT * self.seconds + seconds,
            squares=_KEPT * self.squares + num_tokens * num_tokens,
            products=_KEPT * self.products + num_tokens * seconds,
        )

    def __post_init__(self) -> None:
        # Looked at many times for each request, and changed once a step.
        token_s = self._fitted_token_s()
        fixed_s = max(0.0, self.seconds - token_s * self.tokens) / self.weight if self.weight else 0.0
        object.__setattr__(self, "token_s", token_s)
        object.__setattr__(self, "fixed_s", fixed_s)

    def _fitted_token_s(self) -> float:
        if not self.tokens:
            return 0.0
        mean, all_for_tokens = self.tokens / self.weight, self.seconds / self.tokens
        variance = self.squares / self.weight - mean * mean
        if variance <= _LEAST_SPREAD * mean * mean:
            return all_for_tokens
        covariance = self.products / self.weight - mean * self.seconds / self.weight
        return min(max(covariance / variance, 0.0), all_for_tokens)

    def at(self, num_tokens: int) -> float:
        """Returns the seconds that so many tokens take."""
        return self.fixed_s + self.token_s * num_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaSpeed:
    """The speed of a replica, as far as it was measured.

    A step's time is that of its passage through all stages. In a pipeline other steps are under way meanwhile, so that
    prompts which wait there are expected to take up to as many times longer than they do.

    Attributes:
        prefill: the time of a step by its tokens of prompts, without what its decodes add.
        decode: the time of a step without prompts by its decodes, one of each running sequence.
        answer_tokens: tokens of a usual answer; None: no answer has ended.
    """

    prefill: LineFit = field(default_factory=LineFit)
    decode: LineFit = field(default_factory=LineFit)
    answer_tokens: float | None = None

    @classmethod
    def expected(cls, *, prefill_tokens_per_s: float) -> "ReplicaSpeed":
        """Returns a speed to begin with, which counts as much as two steps that were measured."""
        assert prefill_tokens_per_s > 0, prefill_tokens_per_s
        nothing = LineFit().after(0, 0.0)
        return cls(prefill=nothing.after(_PRIOR_TOKENS, _PRIOR_TOKENS / prefill_tokens_per_s))

    @property
    def is_known(self) -> bool:
        """Tells whether the time of prompts is known."""
        return self.prefill.weight > 0

    def after_step(self, load: StepLoad, duration_s: float) -> "ReplicaSpeed":
        """Returns the speed after one more step, which may have computed nothing."""
        if duration_s <= 0.0:
            return self
        if load.num_prefill_tokens:
            own_s = max(0.0, duration_s - self.decode.token_s * load.num_decodes)
            prefill = self.prefill.after(load.num_prefill_tokens, own_s)
            return ReplicaSpeed(prefill=prefill, decode=self.decode, answer_tokens=self.answer_tokens)
        if load.num_decodes:
            decode = self.decode.after(load.num_decodes, duration_s)
            return ReplicaSpeed(prefill=self.prefill, decode=decode, answer_tokens=self.answer_tokens)
        return self

    def after_answer(self, num_tokens: int) -> "ReplicaSpeed":
        """Returns the speed after one more answer has ended."""
        before = self.answer_tokens
        mean = num_tokens if before is None else _KEPT * before + (1.0 - _KEPT) * num_tokens
        return replace(self, answer_tokens=mean)

    def prefill_s(self, num_tokens: int, *, num_decodes: int, token_budget: int) -> float:
        """Returns the seconds until the last of ``num_tokens`` tokens of prompts is computed.

        They take as many steps as the budget demands, each of which computes the decodes too.
        """
        num_steps = -(-num_tokens // max(1, token_budget - num_decodes))
        step_s = self.prefill.fixed_s + self.decode.token_s * num_decodes
        return num_steps * step_s + num_tokens * self.prefill.token_s

    def place_s(self, num_ahead: int, *, num_running: int) -> float:
        """Returns the seconds until ``num_ahead`` of the running sequences have ended; 0 where that is not known."""
        if self.answer_tokens is None or not num_running or num_ahead <= 0:
            return 0.0
        return num_ahead * self.answer_tokens * self.decode.at(num_running) / num_running
