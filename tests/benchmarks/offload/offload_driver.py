"""The process that decodes for the benchmark of offloaded attention: it loads, then measures what it is asked for.

Keys and values of the contexts are those that the memory begins with: zeros, which take as long as any to attend to.
"""

import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from placement.model.hf import read_model_spec
from placement.model.part import Part
from protos.codec.parts import shard_message
from protos.heterodyne.worker.v1 import worker_pb2 as pb
from tests.benchmarks.engine.engine_models import checkpoint
from tests.benchmarks.offload.offload_arms import Arm, Ask, Sample
from workers.host.device import open_device
from workers.host.model_files import read_json
from workers.sampling.sampling import SamplerState, SamplingParams
from workers.startup.loading import Loaded, LoadJob
from workers.step.types import Batch, SequenceInput

AT = "tests.benchmarks.offload.offload_driver"
BLOCK_SIZE = 16
SECRET = bytes(range(32))
READY = "ready"


def load_request(arm: Arm) -> pb.LoadRequest:
    """Returns what a model rank loads: all blocks at the attention worker, or all at itself."""
    path = checkpoint(arm.shape).absolute()
    model = read_model_spec(read_json(Path(path), "config.json", 1 << 24))
    request = pb.LoadRequest(
        epoch=arm.epoch,
        model_path=str(path),
        dtype=pb.DTYPE_BFLOAT16,
        shard=shard_message(0, Part.whole(model)),
        block_size=BLOCK_SIZE,
        num_blocks=arm.num_blocks,
        token_budget=64,
        max_num_seqs=64,
        max_context_tokens=model.max_context_tokens,
    )
    if arm.is_offloaded:
        holder = pb.KvHolder(worker=0, kv_heads=pb.Range(start=0, stop=model.num_kv_heads))
        region = pb.KvRegion(blocks=pb.Range(start=0, stop=arm.num_blocks), holders=[holder])
        request.residency.CopyFrom(
            pb.KvResidency(
                workers=[pb.AttentionWorker(host=arm.host, port=arm.port, name="attention")],
                regions=[region],
                q_first=arm.q_first,
                staggered=arm.staggered,
                secret=SECRET,
                replica=arm.name,
            )
        )
    return request


def batch_of(ask: Ask, *, first_id: int) -> Batch:
    """Returns a decode of each sequence, whose blocks follow each other."""
    blocks = -(-(ask.context + 1) // BLOCK_SIZE)
    return Batch(sequences=tuple(_sequence(place, ask, blocks, first_id) for place in range(ask.batch)))


def _sequence(place: int, ask: Ask, blocks: int, first_id: int) -> SequenceInput:
    first = place * blocks * BLOCK_SIZE
    return SequenceInput(
        token_ids=[5],
        start=ask.context,
        runs=((first, first + ask.context + 1),),
        sampler=SamplerState(SamplingParams(), ()),
        samples=True,
        sequence_id=first_id + place,
    )


class Decoder:
    """A model rank that is loaded, and steps of which are measured."""

    def __init__(self, loaded: Loaded) -> None:
        assert loaded.engine is not None
        self._runner = loaded.engine.runner
        self._executor = loaded.engine.executor
        self._sessions = () if loaded.offloading is None else loaded.offloading.sessions
        self._next_id = 1

    def measure(self, ask: Ask) -> Sample:
        """Runs a step that counts for nothing and then some that count, and returns their median."""
        batch = batch_of(ask, first_id=self._next_id)
        self._next_id += ask.batch
        self._step(batch)
        before = self._counts()
        times = [self._step(batch) for _ in range(ask.steps)]
        payload, frames = (now - then for now, then in zip(self._counts(), before, strict=True))
        return Sample(
            ask=ask,
            step_s=statistics.median(times),
            payload_bytes=payload,
            frame_bytes=frames,
            rows=ask.batch * ask.steps * sum(session.geometry.num_layers for session in self._sessions),
        )

    def _step(self, batch: Batch) -> float:
        return self._executor.submit(self._runner.prepare(batch)).result().duration_s

    def _counts(self) -> tuple[int, int]:
        counts = [session.counts for session in self._sessions]
        return (
            sum(it.payload_out + it.payload_in for it in counts),
            sum(it.frame_out + it.frame_in for it in counts),
        )


def _asked() -> Iterator[Ask]:
    for line in sys.stdin:
        yield Ask(**json.loads(line))


def main() -> None:
    """Loads the arm that the first argument describes, says so, and answers each line with a sample."""
    arm = Arm(**json.loads(sys.argv[1]))
    job = LoadJob(request=load_request(arm), device=open_device("cpu", arm.threads))
    decoder = Decoder(job.run())
    print(READY, flush=True)
    for ask in _asked():
        print(json.dumps(asdict(decoder.measure(ask))), flush=True)


if __name__ == "__main__":
    main()
