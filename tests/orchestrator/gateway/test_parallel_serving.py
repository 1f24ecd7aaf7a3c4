"""Replicas of several ranks as they are served: real processes, real connections; what a lost rank does to them."""

import asyncio
import os
import shlex
import signal
from collections.abc import Sequence
from pathlib import Path

import grpc
import psutil
import pytest

from kernels.cpu.machine.target import chosen
from orchestrator.cli.render import status_lines
from orchestrator.controller.state import Phase
from orchestrator.deployment.preflight import preflight
from placement.measured.collectives import MEASURED_BYTES
from placement.measured.exchange import Exchange
from placement.model.specs import DType
from protos.heterodyne.v1 import admin_pb2, admin_pb2_grpc, inference_pb2_grpc
from protos.heterodyne.v1 import inference_pb2 as pb
from tests.support.clocks import PATIENCE_S, own_time, until
from tests.support.deploying.deployment import (
    deploy,
    in_stages,
    make_config,
    settled,
    shared_sequences,
    two_ranks,
    two_stages,
)
from tests.support.gateway.answers import answer, check_order, request, tokens
from workers.collectives.algorithms import ALL_REDUCES
from workers.collectives.backends import Library


async def test_answers_are_those_of_one_rank_however_it_is_cut(served_checkpoint: Path, tmp_path: Path) -> None:
    asked = [request(prompt=prompt, max_tokens=40) for prompt in ("a", "once upon a time", "x y z " * 30)]
    found = []
    cuts = {
        "whole": {},
        "even": two_ranks((1, 1)),
        "all of one": two_ranks((0, 1)),
        "stages": two_stages(),
        "stages of two": in_stages((1, 1), (1, 1)),
        "sequences": shared_sequences((5, 2, 1)),
    }
    summing = {"even": ["0"], "all of one": ["0"], "stages of two": ["0", "1"]}
    sharing = {"sequences": ["0"]}
    for name, sections in cuts.items():
        directory = tmp_path / name.replace(" ", "_")
        directory.mkdir()
        config = make_config(directory, served_checkpoint, **sections)
        async with deploy(config) as running, grpc.aio.insecure_channel(running.address) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            answers = await asyncio.gather(*(answer(stub, message) for message in asked))
            found.append([tokens(responses) for responses in answers])
            await check_measured(channel, summing=summing.get(name, []), sharing=sharing.get(name, []))
            await settled(running, timeout_s=PATIENCE_S)
    assert all(answers == found[0] for answers in found)


async def test_a_prompt_several_times_longer_than_one_ranks_kv_memory_is_served(
    served_checkpoint: Path, tmp_path: Path
) -> None:
    asked = request(prompt="x y z " * 70, max_tokens=20)
    found = []
    for name, split, kv_cache in (("whole", (1,), "16MiB"), ("shared", (1, 1, 1, 1), "64KiB")):
        directory = tmp_path / name
        directory.mkdir()
        sections = shared_sequences(split)
        sections["serving"] |= {"kv_cache": kv_cache, "token_budget": 64}
        config = make_config(directory, served_checkpoint, **sections)
        replica = preflight(config).plan.replicas[0]
        async with deploy(config) as running, grpc.aio.insecure_channel(running.address) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            responses = await answer(stub, asked)
            found.append(tokens(responses))
            num_prompt_tokens = responses[-1].finished.usage.prompt_tokens
    one_rank = replica.num_blocks * config.serving.block_size // 4
    assert num_prompt_tokens > 3 * one_rank
    assert found[0] == found[1]


async def check_measured(channel: grpc.aio.Channel, *, summing: Sequence[str], sharing: Sequence[str]) -> None:
    """The status has what these stages of the first replica measured, and of no other.

    Args:
        summing: those whose ranks sum, in one batch or in two.
        sharing: those whose ranks share sequences.
    """
    status = await admin_pb2_grpc.AdminStub(channel).GetStatus(admin_pb2.GetStatusRequest(), timeout=PATIENCE_S)
    lines = [dict(word.split("=", 1) for word in shlex.split(line)) for line in status_lines(status, measured=True)]
    assert {line["target"] for line in lines if line["event"] == "rank"} == {chosen().name}
    assert status.dtype in [dtype.value for dtype in DType]
    sums = [line for line in lines if line["event"] == "sum"]
    expected = [("replica-0", stage, str(num_bytes)) for stage in summing for num_bytes in MEASURED_BYTES]
    assert [(line["replica"], line["stage"], line["num_bytes"]) for line in sums] == expected
    assert all(line["algorithm"] in (*ALL_REDUCES, Library.GLOO) and float(line["duration_s"]) > 0 for line in sums), (
        sums
    )
    overlap = [line for line in lines if line["event"] == "overlap"]
    assert [line["stage"] for line in overlap if line["num_tokens"] == "64"] == list(summing)
    assert all(float(line["one_batch_s"]) > 0 < float(line["two_micro_batches_s"]) for line in overlap), overlap
    assert all(line["micro_batches"] in "12" for line in overlap), overlap
    exchanges = [line for line in lines if line["event"] == "exchange"]
    assert [line["stage"] for line in exchanges] == list(sharing)
    assert all(float(line["latency_s"]) > 0 and "," in line["pairs_per_s"] for line in exchanges), exchanges
    chunks = [line for line in lines if line["event"] == "expected_exchange"]
    assert [(line["stage"], line["num_before"]) for line in chunks] == [(stage, "0") for stage in sharing]
    assert all(line["exchange"] in {way.value for way in Exchange} for line in chunks), chunks


LOST = {signal.SIGKILL: ("SIGKILL",), signal.SIGSTOP: ("no pulse", "no heartbeat", "stream")}


# Either rank is lost in either way, however the model is cut: every pair of the three, for how ranks watch each other
# does not depend on what they hold.
@pytest.mark.parametrize(
    ("sections", "rank", "number"),
    [
        pytest.param(two_ranks((1, 1)), 0, signal.SIGKILL, id="one stage, leader killed"),
        pytest.param(two_ranks((1, 1)), 1, signal.SIGSTOP, id="one stage, follower frozen"),
        pytest.param(two_stages(), 0, signal.SIGSTOP, id="two stages, leader frozen"),
        pytest.param(two_stages(), 1, signal.SIGKILL, id="two stages, follower killed"),
        pytest.param(shared_sequences((1, 1)), 0, signal.SIGSTOP, id="shared sequences, leader frozen"),
        pytest.param(shared_sequences((1, 1)), 1, signal.SIGKILL, id="shared sequences, follower killed"),
    ],
)
async def test_a_lost_rank_ends_its_replica_within_3_s_and_leaves_no_process(
    slow_checkpoint: Path,
    tmp_path: Path,
    sections: dict[str, dict[str, object]],
    rank: int,
    number: signal.Signals,
) -> None:
    config = make_config(tmp_path, slow_checkpoint, **sections)
    async with deploy(config) as running, grpc.aio.insecure_channel(running.address) as channel, own_time() as clock:
        stub = inference_pb2_grpc.InferenceStub(channel)
        pids = [running.pid("replica-0", each) for each in range(2)]
        got: list[pb.GenerateResponse] = []

        async def follow() -> grpc.StatusCode:
            call = stub.Generate(request(max_tokens=400), timeout=PATIENCE_S)
            try:
                async for response in call:
                    got.append(response)
            except grpc.aio.AioRpcError as error:
                return error.code()
            return grpc.StatusCode.OK

        following = asyncio.create_task(follow())
        await until(lambda: len(got) > 3)
        lost_s = clock.now_s
        os.kill(pids[rank], number)
        assert await following is grpc.StatusCode.UNAVAILABLE
        assert clock.now_s - lost_s < 3.0
        check_order(got)
        await until(lambda: running.shell.state.phase is Phase.FAILED)
        assert running.shell.state.cause.startswith("rank ")
        assert any(word in running.shell.state.cause for word in LOST[number]), running.shell.state.cause
        await until(lambda: not any(map(psutil.pid_exists, pids)))


@pytest.mark.parametrize("rank", [0, 1])
async def test_a_rank_that_freezes_while_nothing_is_asked_is_noticed(
    served_checkpoint: Path, tmp_path: Path, rank: int
) -> None:
    async with deploy(make_config(tmp_path, served_checkpoint, **two_ranks((1, 1)))) as running, own_time() as clock:
        frozen_s = clock.now_s
        os.kill(running.pid("replica-0", rank), signal.SIGSTOP)
        await until(lambda: running.shell.state.phase is Phase.FAILED)
        assert clock.now_s - frozen_s < 4.0
