"""``make bench-memory``: the most memory that each rank of a cut model took, against what its plan reckoned with.

The 1.1 B Llama shape in bfloat16, served by real worker processes on this machine, cut in several ways; prompts fill
the KV blocks, which count only once they were written. What is read is the high-water mark of a process's resident set,
so that neither load nor other processes change it much.
"""

import argparse
import asyncio
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

from orchestrator.deployment.preflight import preflight
from placement.planning.memory import CPU_PROCESS_BYTES, format_bytes
from protos.heterodyne.v1 import inference_pb2, inference_pb2_grpc
from tests.benchmarks.engine.engine_models import SHAPES, checkpoint, read_spec
from tests.benchmarks.report import RESULTS, Metric, Report, Rows, publish
from tests.support.deploying.deployment import deploy, in_stages, make_config, shared_sequences, two_ranks

SHAPE = "llama-1.1b"
TOKEN_BUDGET = 512
KV_CACHE = "64MiB"
_REQUEST_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One rank: bytes that its plan reckoned with, and the most it took."""

    planned_bytes: int
    peak_bytes: int

    @property
    def ratio(self) -> float:
        """Of what was taken to what was planned."""
        return self.peak_bytes / self.planned_bytes


def layouts(num_layers: int) -> dict[str, dict[str, dict[str, object]]]:
    """Sections of a configuration, by the name of the way of cutting a model of so many layers.

    A stage's layers are not all that it holds: the first also has the embedding and the head.
    """
    quarter = max(1, num_layers // 4)
    return {
        "tensor 3:1": two_ranks((3, 1)),
        "sequences 3:1": shared_sequences((3, 1)),
        "stages": in_stages((1,), (1,)),
        "stages 3:1": in_stages((1,), (1,), last_layers=quarter),
        "stages 3:1 of tensor 3:1": in_stages((3, 1), (3, 1), last_layers=quarter),
    }


async def measure(model: Path, sections: Mapping[str, Mapping[str, object]], directory: Path) -> list[Measured]:
    """All ranks of a replica, once its KV blocks have been filled twice over."""
    serving = {"kv_cache": KV_CACHE, "token_budget": TOKEN_BUDGET, "max_num_seqs": 8}
    config = make_config(directory, model, cluster=sections["cluster"], serving={**sections["serving"], **serving})
    replica = preflight(config).plan.replicas[0]
    num_tokens = replica.num_blocks * config.serving.block_size // 2 - 16
    async with deploy(config) as running, grpc.aio.insecure_channel(running.address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        for number in range(4):
            ids = [3 + (number * 7919 + i * 31) % 30_000 for i in range(num_tokens)]
            prompt = inference_pb2.TokenIds(ids=ids)
            request = inference_pb2.GenerateRequest(prompt_ids=prompt, max_tokens=4)
            async for _ in stub.Generate(request, timeout=_REQUEST_S):
                pass
        peaks = [peak_bytes(running.pid("replica-0", shard.rank)) for shard in replica.shards]
    return [
        Measured(
            planned_bytes=shard.weight_bytes + shard.kv_bytes + shard.workspace_bytes + CPU_PROCESS_BYTES,
            peak_bytes=peak,
        )
        for shard, peak in zip(replica.shards, peaks, strict=True)
    ]


def peak_bytes(pid: int) -> int:
    """The most that a process has had resident."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"process {pid} tells no high-water mark")


def report(found: Mapping[str, Sequence[Measured]]) -> Report:
    """Every rank's ratio, and the one furthest from 1."""
    ratios = [one.ratio for ranks in found.values() for one in ranks]
    worst = max(ratios, key=lambda ratio: abs(ratio - 1))
    rows = [
        (name, str(rank), format_bytes(one.planned_bytes), format_bytes(one.peak_bytes), f"{one.ratio:.3f}")
        for name, ranks in found.items()
        for rank, one in enumerate(ranks)
    ]
    spread = (min(ratios), max(ratios))
    return Report(
        name="memory",
        headline=f"peak memory over plan: {worst:.3f} at the rank furthest from it",
        metrics={"peak_over_plan_worst": Metric(value=worst, unit="ratio", samples=len(ratios), spread=spread)},
        tables=[Rows(title="resident set", columns=("cut", "rank", "planned", "peak", "ratio"), rows=rows)],
        settings={"shape": SHAPE, "token_budget": TOKEN_BUDGET, "kv_cache": KV_CACHE},
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", choices=list(layouts(2)), help="ways of cutting; default: all")
    parser.add_argument("--shape", default=SHAPE, choices=SHAPES)
    parser.add_argument("--output", type=Path, default=RESULTS / "memory.json")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures all layouts, or those that are named."""
    options = parse(argv)
    load_at_start = os.getloadavg()
    model = checkpoint(options.shape).absolute()
    ways = layouts(read_spec(model).num_layers)
    found: dict[str, list[Measured]] = {}
    for name in options.only or ways:
        with tempfile.TemporaryDirectory() as directory:
            found[name] = asyncio.run(measure(model, ways[name], Path(directory)))
    publish(report(found), load_at_start=load_at_start, output=options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
