"""The sizes that a replica serves within."""

from dataclasses import dataclass

from placement.errors import InvalidConfig
from placement.model.quantization import Quantization


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaLimits:
    """The sizes that a replica serves within. Its ranks, their memory and what is scheduled there all go by them.

    Attributes:
        block_size: tokens of a KV block.
        token_budget: the most tokens in a step, decodes counted.
        max_num_seqs: the most sequences that hold blocks; at most ``token_budget``, or decodes could stall.
        prefix_cache: whether computed blocks are kept for sequences to come.
        quantization: what the weights of linear layers are rounded to while they load.

    Raises:
        InvalidConfig: a size is below 1, or the budget cannot hold a decode of every sequence.
    """

    block_size: int
    token_budget: int
    max_num_seqs: int
    prefix_cache: bool = True
    quantization: Quantization = Quantization.NONE

    def __post_init__(self) -> None:
        for name in ("block_size", "token_budget", "max_num_seqs"):
            value = getattr(self, name)
            if value < 1:
                raise InvalidConfig(field=f"serving.{name}", value=value, problem="must be at least 1", fix="Raise it.")
        if self.token_budget < self.max_num_seqs:
            problem = f"is below serving.max_num_seqs ({self.max_num_seqs}), so decodes would stall"
            fix = "Raise token_budget or lower max_num_seqs."
            raise InvalidConfig(field="serving.token_budget", value=self.token_budget, problem=problem, fix=fix)
