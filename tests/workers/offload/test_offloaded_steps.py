"""Steps of a runner whose keys and values attention workers hold give the logits of one that holds them itself."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from placement.planning.residency import Partition, Residency, resident
from placement.serving.offload.orders import Geometry
from placement.serving.offload.residents import SessionPlace
from tests.support.offload.runners import BLOCK_SIZE, NUM_BLOCKS, Connect, DenseSession, offloaded_runner, steps
from tests.support.offload.sessions import attention_worker, open_session
from tests.support.oracle import WIDE
from workers.attention_worker.session import AttentionSession
from workers.step.runner import ModelRunner

SHAPES = [(1, [1.0], 0), (4, [3.0, 1.0], NUM_BLOCKS // 2), (8, [1.0, 2.0, 1.0], 0), (2, [1.0, 2.0, 2.0], 40)]
WINDOWED = {"sliding_window": 11, "num_hidden_layers": 3, "layer_types": ["sliding_attention", "full_attention"] * 2}


def residency_of(partition: Partition, weights: list[float], num_local: int, num_kv_heads: int) -> Residency:
    remote = NUM_BLOCKS - num_local
    share = remote // len(weights) if partition is Partition.REQUESTS else remote
    return resident(
        partition,
        weights,
        num_kv_heads=num_kv_heads,
        block_size=BLOCK_SIZE,
        num_local_blocks=num_local,
        num_remote_blocks=[share] * len(weights),
    )


def dense(place: SessionPlace, geometry: Geometry) -> AttentionSession:
    return DenseSession(geometry=geometry)


@contextmanager
def real_workers(count: int) -> Iterator[Connect]:
    """Opens sessions with attention workers that run."""
    with ExitStack() as stack:
        addresses = [stack.enter_context(attention_worker())[1] for _ in range(count)]

        def connect(place: SessionPlace, geometry: Geometry) -> AttentionSession:
            return open_session(addresses[place.holder.worker], geometry, replica=f"of region {place.region}")

        yield connect


def check_equal(offloaded: ModelRunner, plain: ModelRunner, residency: Residency, seed: int) -> None:
    for batch in steps(residency, seed):
        torch.testing.assert_close(offloaded.logits(batch), plain.logits(batch), atol=1e-4, rtol=1e-4)


def group_checkpoint(checkpoint: Callable[..., Path], group: int) -> Path:
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 8 // group, "head_dim": 16}
    return checkpoint("llama", num_hidden_layers=2, hidden_size=64, **sizes)


@pytest.mark.parametrize("is_real", [False, True], ids=["dense", "real"])
@pytest.mark.parametrize("partition", Partition)
@pytest.mark.parametrize(("group", "weights", "num_local"), SHAPES)
def test_logits_are_those_of_a_runner_that_holds_all(
    group: int,
    weights: list[float],
    num_local: int,
    partition: Partition,
    is_real: bool,
    checkpoint: Callable[..., Path],
    make_runner: Callable[..., ModelRunner],
) -> None:
    path = group_checkpoint(checkpoint, group)
    residency = residency_of(partition, weights, num_local, 8 // group)
    with ExitStack() as stack:
        connect = stack.enter_context(real_workers(len(weights))) if is_real else dense
        runner = offloaded_runner(
            path, residency, connect, staggered=partition is not Partition.REQUESTS, q_first=is_real and group > 1
        )
        check_equal(runner, make_runner(path), residency, seed=group)


@pytest.mark.parametrize("staggered", [False, True])
@pytest.mark.parametrize("partition", Partition)
@pytest.mark.parametrize(
    ("family", "config"),
    [("mistral", {"sliding_window": 11}), ("gemma3_text", WINDOWED | {"layer_types": WINDOWED["layer_types"][:3]})],
)
def test_windows_of_layers_are_kept(
    family: str,
    config: dict[str, object],
    partition: Partition,
    staggered: bool,
    checkpoint: Callable[..., Path],
    make_runner: Callable[..., ModelRunner],
) -> None:
    path = checkpoint(family, head_dim=32, **config)
    num_kv_heads = json.loads((path / "config.json").read_text())["num_key_value_heads"]
    residency = residency_of(partition, [1.0, 1.0], 30, num_kv_heads)
    check_equal(offloaded_runner(path, residency, dense, staggered=staggered), make_runner(path), residency, seed=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("staggered", [False, True])
@pytest.mark.parametrize("partition", [Partition.KV_HEADS, Partition.TOKEN_RANGES])
@pytest.mark.parametrize("ladder", [False, True])
def test_layers_in_a_program_and_ladders_stop_for_attention(
    dtype: torch.dtype,
    staggered: bool,
    partition: Partition,
    ladder: bool,
    checkpoint: Callable[..., Path],
    make_runner: Callable[..., ModelRunner],
) -> None:
    path = checkpoint("llama", seed=6, num_hidden_layers=3, **WIDE)
    if ladder:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {"ladder_residual": True}))
    residency = residency_of(partition, [2.0, 1.0], 40, WIDE["num_key_value_heads"])
    with real_workers(2) as connect:
        runner = offloaded_runner(path, residency, connect, dtype=dtype, staggered=staggered and not ladder)
        plain, exact = make_runner(path, dtype), make_runner(path)
        assert (runner._weights.fused is not None) == (dtype == torch.bfloat16)
        for batch in steps(residency, seed=8):
            found, expected, wanted = runner.logits(batch).float(), plain.logits(batch).float(), exact.logits(batch)
            if dtype == torch.float32:
                torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
            assert (found - wanted).norm() <= 1.5 * (expected - wanted).norm() + 1e-3 * wanted.norm()


def test_only_steps_of_several_sequences_that_ask_are_staggered_and_both_halves_are_under_way(
    checkpoint: Callable[..., Path], make_runner: Callable[..., ModelRunner]
) -> None:
    path = group_checkpoint(checkpoint, 2)
    residency = residency_of(Partition.KV_HEADS, [1.0], 0, 4)
    sessions: list[DenseSession] = []

    def connect(place: SessionPlace, geometry: Geometry) -> AttentionSession:
        sessions.append(DenseSession(geometry=geometry))
        return sessions[-1]

    runner = offloaded_runner(path, residency, connect)
    for batch in steps(residency, seed=1):
        before = len(sessions[0].orders)
        runner.logits(batch)
        asking = sum(bool(sequence.start) for sequence in batch.sequences)
        told = sessions[0].orders[before:]
        assert len(told) == (2 if asking > 1 else 1)
        assert all(order.spans for order in told) or asking < 2
    assert not sessions[0].found, "all answers are taken"


def test_names_are_told_once_a_step_and_with_nothing_else_too(checkpoint: Callable[..., Path]) -> None:
    path = group_checkpoint(checkpoint, 2)
    residency = residency_of(Partition.REQUESTS, [1.0, 1.0], 0, 4)
    sessions: list[DenseSession] = []

    def connect(place: SessionPlace, geometry: Geometry) -> AttentionSession:
        sessions.append(DenseSession(geometry=geometry))
        return sessions[-1]

    runner = offloaded_runner(path, residency, connect)
    batches = steps(residency, seed=1)
    for number, batch in enumerate(batches):
        runner.logits(replace(batch, names=((number, bytes(32)),), forgotten=(number + 1,)))
    for session in sessions:
        assert [order.names for order in session.orders if order.names] == [
            ((number, bytes(32)),) for number in range(len(batches))
        ]
        assert sum(map(len, (order.forgotten for order in session.orders))) == len(batches)
