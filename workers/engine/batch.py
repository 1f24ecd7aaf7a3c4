"""Turns a step's plan into the batch that the runner computes."""

from collections.abc import Sequence

from kernels.attention import SharedSpan
from placement.serving.events import Run
from placement.serving.kv.runs import block_runs
from placement.serving.sharing import shared_prefixes
from workers.engine.sequence import EngineSequence
from workers.step.types import Batch


def make_batch(run: Run, sequences: Sequence[EngineSequence], block_size: int) -> Batch:
    """Returns the batch of a step: one chunk of each of ``sequences``, and the KV that chunks of one token share."""
    rows = zip(sequences, run.plan.chunks, run.token_ids, run.tables, strict=True)
    return Batch(
        sequences=tuple(sequence.take_chunk(chunk, token_ids, table) for sequence, chunk, token_ids, table in rows),
        shared=_shared(run, block_size),
        names=run.names,
        forgotten=run.forgotten,
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
