"""Owns the command ``plan``: what ``serve`` would do, without doing it, in words and as a picture."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from orchestrator.cli.output_file import write_output
from orchestrator.cli.plan_picture import plan_svg
from orchestrator.cli.render import key_values
from orchestrator.config.document import load_config
from orchestrator.deployment.auto_split import split_line
from orchestrator.deployment.preflight import Checked, preflight
from placement.planning.memory import format_bytes
from placement.planning.plan import Span


def show_plan(path: Path, *, overrides: Sequence[str], picture: Path | None) -> Iterator[str]:
    """The lines of the plan for a cluster file; writes ``picture``, where one is asked for. Starts nothing.

    Raises:
        HeterodyneError: a mistake in the input.
    """
    checked = preflight(load_config(path, overrides=overrides), listens=False)
    yield from plan_lines(checked)
    if checked.split_by is not None:
        yield split_line(checked, when_served="by measured speed")
    if picture is None:
        return
    write_output(picture, plan_svg(checked.plan), field="--svg")
    yield f"drawn in {picture}"


def plan_lines(checked: Checked) -> Iterator[str]:
    """Who will hold what, one line a rank."""
    plan, names = checked.plan, checked.config.cluster.worker_names
    ranks = [
        (replica, stage, shard)
        for replica in plan.replicas
        for stage, its in enumerate(replica.stages)
        for shard in its.shards
    ]
    for replica, stage, shard in ranks:
        part = shard.part
        yield key_values(
            event="plan",
            replica=replica.name,
            stage=stage,
            rank=shard.rank,
            worker=names[checked.workers[replica.name, shard.rank]],
            device=shard.device.name,
            threads=shard.device.num_threads,
            layers=_range(part.layers),
            kv_heads=_range(part.kv_heads),
            ffn_columns=_range(part.ffn_columns),
            vocab_rows=_range(part.vocab_rows),
            block_slots="" if part.stripe is None else f"{part.stripe.start}-{part.stripe.stop}",
            weights=format_bytes(shard.weight_bytes),
            kv=format_bytes(shard.kv_bytes),
            kv_tokens=shard.num_blocks * plan.block_size,
        )


def _range(span: Span) -> str:
    return f"{span.start}-{span.stop}" if len(span) else "none"
