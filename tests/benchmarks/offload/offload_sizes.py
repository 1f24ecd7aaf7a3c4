"""How much the benchmark of offloaded attention measures, and what it measures with."""

from dataclasses import dataclass

RATE_BITS_PER_S = 1e9
DELAY_S = 2e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What is measured, and how often.

    Attributes:
        shape: of the random checkpoint, by its name in ``engine_models``.
        group_shapes: shapes with 1 and 8 query heads to a KV head, by that number.
        context: tokens of a sequence where one figure stands for all.
        capped: sequences of that context whose keys and values the model worker alone has memory for.
        held: as many as the attention worker has memory for.
        group_batch: sequences where queries go first, or not.
        group_context: their tokens.
        contexts: tokens of a sequence, for the plot.
        delays_s: of the link one way, for the plot.
        most_sequences: the largest batch that is measured, however many fit.
        steps: decodes in one sample.
    """

    shape: str = "smollm-135m"
    group_shapes: tuple[tuple[int, str], ...] = ((1, "llama-g1"), (8, "llama-g8"))
    context: int = 2048
    capped: int = 4
    held: int = 32
    group_batch: int = 8
    group_context: int = 1024
    contexts: tuple[int, ...] = (256, 1024, 2048, 8192)
    delays_s: tuple[float, ...] = (5e-5, 2e-4, 1e-3, 5e-3)
    most_sequences: int = 32
    repeats: int = 3
    steps: int = 8

    def fitting(self, sequences: int, context: int) -> int:
        """Counts the sequences that fit where ``sequences`` of ``self.context`` tokens do; at least one."""
        return max(1, min(self.most_sequences, sequences * self.context // context))


def quick() -> Sizes:
    """Returns sizes that are only large enough to see that all of it runs."""
    return Sizes(
        shape="tiny", group_shapes=((1, "tiny"), (8, "tiny")), context=128, capped=2, held=4, group_batch=2,
        group_context=64, contexts=(64, 128), delays_s=(5e-5, 1e-3), most_sequences=4, repeats=1, steps=2,
    )  # fmt: skip
