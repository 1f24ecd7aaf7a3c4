"""Turns a step's plan into the batch that the runner computes."""

from collections.abc import Sequence

from kernels.attention import SharedSpan
from placement.serving.events import Run
from placement.serving.kv.runs import block_runs
from placement.serving.sharing import shared_prefixes
from workers.engine.work import Work
from workers.step.types import Batch


def make_batch(run: Run, works: Sequence[Work], block_size: int) -> Batch:
    """The chunks of ``works``, one each, and the KV that single tokens among them have in common."""
    each = zip(works, run.plan.chunks, run.token_ids, run.tables, strict=True)
    return Batch(
        sequences=tuple(work.take_chunk(chunk, token_ids, table) for work, chunk, token_ids, table in each),
        shared=_shared(run, block_size),
    )


def _shared(run: Run, block_size: int) -> tuple[SharedSpan, ...]:
    chunks = run.plan.chunks
    singles = [index for index, chunk in enumerate(chunks) if chunk.num_tokens == 1]
    tables = [run.tables[index] for index in singles]
    num_tokens = [chunks[index].stop for index in singles]
    return tuple(
        SharedSpan(
            members=tuple(singles[member] for member in prefix.members),
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
