"""Checks which loads are refused for want of memory, before and while they run, and which are warned of."""

from pathlib import Path
from typing import Any

import pytest

from placement.errors import NotEnoughMemory
from placement.planning.memory import Footprint
from protos.codec.log_record import record_of
from protos.heterodyne.worker.v1 import worker_pb2 as pb
from workers.engine.types import Stopping
from workers.host.device import open_device
from workers.startup import checkpoint, loading
from workers.startup.checks import check_memory
from workers.startup.loading import LoadJob

MIB = 2**20


def load_request(path: Path, **fields: Any) -> pb.LoadRequest:
    return pb.LoadRequest(
        model_path=str(path),
        shard=pb.Shard(layers={"stop": 2}, kv_heads={"stop": 2}, ffn_columns={"stop": 96}, vocab_rows={"stop": 509}),
        block_size=8,
        num_blocks=64,
        token_budget=32,
        max_num_seqs=8,
        max_context_tokens=256,
        **fields,
    )


def need(weights: int, kv: int, workspace: int) -> Footprint:
    return Footprint(weight_bytes=weights, kv_bytes=kv, workspace_bytes=workspace, process_bytes=0)


@pytest.mark.parametrize(
    ("available", "field", "fix"),
    [
        (599 * MIB, "serving.kv_cache", "Set serving.kv_cache to 199 MiB or less."),
        (301 * MIB, "serving.token_budget", "Lower serving.token_budget"),
        (299 * MIB, "model.path", "smaller model"),
    ],
)
def test_the_setting_that_would_help_is_named(available: int, field: str, fix: str) -> None:
    check_memory(need(300 * MIB, 200 * MIB, 100 * MIB), 600 * MIB, where="cpu")
    with pytest.raises(NotEnoughMemory) as caught:
        check_memory(need(300 * MIB, 200 * MIB, 100 * MIB), available, where="cpu")
    assert (caught.value.field, caught.value.value) == (field, None), "no value that a user gave"
    assert fix in caught.value.fix
    assert "300 MiB weights + 200 MiB KV blocks + 100 MiB workspace are needed" in str(caught.value)


class Reached(Exception):
    """The load began to read weights."""


@pytest.mark.every_target
@pytest.mark.parametrize("quantization", [pb.QUANTIZATION_UNSPECIFIED, pb.QUANTIZATION_INT8, pb.QUANTIZATION_INT4])
@pytest.mark.parametrize("dtype", [pb.DTYPE_BFLOAT16, pb.DTYPE_FLOAT32])
def test_rounded_weights_that_are_slow_here_are_warned_of_before_they_load(
    llama_checkpoint: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, dtype: Any,
    quantization: Any,
) -> None:  # fmt: skip
    """Whatever the CPU, they are slow in float32, and only there."""

    def load_weights(path: Path, *_: object) -> None:
        raise Reached

    monkeypatch.setattr(loading, "load_weights", load_weights)
    with pytest.raises(Reached):
        LoadJob(
            request=load_request(llama_checkpoint(), dtype=dtype, quantization=quantization),
            device=open_device("cpu", 1),
        ).run()
    records = [record_of(record, "worker") for record in caplog.records]
    causes = [record.fields["cause"] for record in records if record.event == "slow_quantization"]
    is_slow = dtype == pb.DTYPE_FLOAT32 and quantization != pb.QUANTIZATION_UNSPECIFIED
    assert causes == (["only bfloat16, and not float32, is fast"] if is_slow else [])


def test_a_kv_cache_of_less_than_a_block_is_not_proposed() -> None:
    """A setting rounded down to whole MiB would hold no block of 1.5 MiB."""
    block = 3 * MIB // 2
    for available, field, fix in (
        (block, "serving.kv_cache", "to 1536 KiB or less"),
        (MIB, "serving.token_budget", ""),
    ):
        with pytest.raises(NotEnoughMemory) as caught:
            check_memory(need(0, 3 * block, 0), available, where="cpu", least_setting=block)
        assert caught.value.field == field and fix in caught.value.fix


def test_memory_that_runs_out_while_loading_is_typed(llama_checkpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_weights(path: Path, *_: object) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(loading, "load_weights", load_weights)
    request = load_request(llama_checkpoint(), dtype=pb.DTYPE_FLOAT32)
    with pytest.raises(NotEnoughMemory, match="ran out of memory while loading") as caught:
        LoadJob(request=request, device=open_device("cpu", 1)).run()
    assert caught.value.field == "serving.kv_cache"


def test_a_load_that_is_stopped_reads_no_more_weights(llama_checkpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    job = LoadJob(request=load_request(llama_checkpoint(), dtype=pb.DTYPE_FLOAT32), device=open_device("cpu", 1))
    read: list[int] = []

    def load_weights(*arguments: Any) -> None:
        path, slices, dtype, device, progress, linear = arguments

        def stop_at_the_third(loaded_bytes: int, total_bytes: int) -> None:
            read.append(loaded_bytes)
            if len(read) == 3:
                job.stop()
            progress(loaded_bytes, total_bytes)

        checkpoint.load_weights(path, slices, dtype, device, stop_at_the_third, linear)

    monkeypatch.setattr(loading, "load_weights", load_weights)
    with pytest.raises(Stopping):
        job.run()
    assert len(read) == 3
