"""Turns a step's plan into the batch that the runner computes."""

from collections.abc import Sequence

from kernels.attention import SharedSpan
from placement.serving.runs import block_runs
from placement.serving.sharing import shared_prefixes
from placement.serving.step_plan import Chunk
from workers.engine.work import Work
from workers.step.types import Batch


def make_batch(chunks: Sequence[Chunk], works: Sequence[Work], block_size: int) -> Batch:
    """The chunks of ``works``, one each, and the KV that decodes among them have in common."""
    return Batch(
        sequences=tuple(work.take_chunk(chunk) for chunk, work in zip(chunks, works, strict=True)),
        shared=_shared(chunks, works, block_size),
    )


def _shared(chunks: Sequence[Chunk], works: Sequence[Work], block_size: int) -> tuple[SharedSpan, ...]:
    decodes = [index for index, chunk in enumerate(chunks) if chunk.num_tokens == 1]
    tables = [works[index].sequence.block_table for index in decodes]
    num_tokens = [chunks[index].start + 1 for index in decodes]
    return tuple(
        SharedSpan(
            members=tuple(decodes[member] for member in prefix.members),
            first_token=prefix.first_block * block_size,
            num_tokens=prefix.num_blocks * block_size,
            runs=block_runs(
                tables[prefix.members[0]][prefix.first_block : prefix.first_block + prefix.num_blocks],
                block_size,
                prefix.num_blocks * block_size,
            ),
        )
        for prefix in shared_prefixes(tables, num_tokens, block_size)
    )
