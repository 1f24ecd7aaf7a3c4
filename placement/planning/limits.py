"""The sizes that a replica serves within."""

import math
from collections.abc import Collection
from dataclasses import dataclass

from placement.errors import InvalidConfig
from placement.model.quantization import Quantization

MOST_AUTO_TOKENS = 512
"""The most tokens of a step that is sized by its time, where a CPU computes. A CPU's products run at full speed from
some tens of tokens on, so more would only lengthen the step; and memory is planned for as many."""

MOST_AUTO_TOKENS_ON_GPUS = 2048
"""The same where GPUs compute everything: their products need some thousand tokens to run at full speed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaLimits:
    """The sizes that a replica serves within. Its ranks, their memory and what is scheduled there all go by them.

    Attributes:
        block_size: tokens of a KV block.
        token_budget: the most tokens in a step, decodes counted. Memory is planned for as many.
        max_num_seqs: the most sequences that hold blocks; at most ``token_budget``, or decodes could stall.
        prefix_cache: whether computed blocks are kept for sequences to come.
        quantization: what the weights of linear layers are rounded to while they load.
        step_time_s: seconds that a step may take: the replica chooses the largest budget within them, by what it
            measures when it starts, and at most ``token_budget``. None: it serves with ``token_budget`` itself.

    Raises:
        InvalidConfig: a size is below 1, or the budget cannot hold a decode of every sequence, or a time is not
            positive.
    """

    block_size: int
    token_budget: int
    max_num_seqs: int
    prefix_cache: bool = True
    quantization: Quantization = Quantization.NONE
    step_time_s: float | None = None

    def __post_init__(self) -> None:
        for name in ("block_size", "token_budget", "max_num_seqs"):
            value = getattr(self, name)
            if value < 1:
                raise InvalidConfig(field=f"serving.{name}", value=value, problem="must be at least 1", fix="Raise it.")
        if self.step_time_s is not None and not 0 < self.step_time_s < math.inf:
            problem, fix = "is no time that a step could take", "Set it to some tenths of a second."
            raise InvalidConfig(field="serving.step_time_s", value=self.step_time_s, problem=problem, fix=fix)
        if self.token_budget < self.max_num_seqs:
            problem = f"is below serving.max_num_seqs ({self.max_num_seqs}), so decodes would stall"
            fix = "Raise token_budget or lower max_num_seqs."
            raise InvalidConfig(field="serving.token_budget", value=self.token_budget, problem=problem, fix=fix)

    @property
    def budget_words(self) -> str:
        """Says what the token budget is, before anything is measured."""
        return str(self.token_budget) if self.step_time_s is None else f"auto (at most {self.token_budget})"


def most_auto_tokens(device_kinds: Collection[str], *, max_num_seqs: int) -> int:
    """Returns the most tokens of a step that is sized by its time, on devices of these kinds: ``cpu`` or ``cuda``."""
    on_gpus = all(kind == "cuda" for kind in device_kinds)
    return max(MOST_AUTO_TOKENS_ON_GPUS if on_gpus else MOST_AUTO_TOKENS, max_num_seqs)
