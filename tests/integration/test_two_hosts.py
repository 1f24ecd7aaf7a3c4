"""One replica over two hosts with a network between them, through real Ray, until that network is cut."""

import asyncio
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest
import yaml

from orchestrator.cli.client import stream_generate
from protos.heterodyne.v1 import inference_pb2 as pb
from tests.netlab import system
from tests.netlab.lab import Lab, lab
from tests.netlab.ray_nodes import ENV, LABEL, ray_nodes
from tests.netlab.requirements import missing
from tests.netlab.specs import HostSpec, LinkConditions
from tests.support.clocks import PATIENCE_S, own_time, until
from tests.support.deploying.deployment import deploy, make_config
from tests.support.deploying.service import REPOSITORY, START_S, STOP_S, Command

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(400),
    pytest.mark.skipif((reason := missing()) is not None, reason=reason or ""),
]

MODEL = REPOSITORY / "deploy/demo"
ORCHESTRATOR = [sys.executable, "-m", "orchestrator"]
PROMPTS = ("In the beginning", "And the LORD said unto Moses,")
MAX_TOKENS = 48
LOST_S = 3.0
OURS = ("-m workers", "-m orchestrator", "ray::NodeAgent", "ray::Controller")


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """``serve`` on the host big, with a rank there and one on small."""

    net: Lab
    command: Command
    address: str

    def ask(self, *args: str) -> str:
        """What a command of ours says where the service is."""
        argv = [*ORCHESTRATOR, *args, "--address", self.address]
        return self.net["big"].run(argv, cwd=REPOSITORY, env=os.environ | ENV).stdout

    def ours(self) -> list[str]:
        """The processes of ours on both hosts, by their command lines."""
        found = []
        for host in (self.net["big"], self.net["small"]):
            for pid in system.ip("netns", "pids", host.namespace).split():
                try:
                    line = " ".join(psutil.Process(int(pid)).cmdline())
                except psutil.NoSuchProcess:
                    continue
                found += [f"{host.spec.name}: {line}"] if any(name in line for name in OURS) else []
        return found


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    path = tmp_path_factory.mktemp("two_hosts") / "cluster.yaml"
    delay = LinkConditions(delay_s=0.001)
    with (
        lab(HostSpec(name="big"), HostSpec(name="small"), conditions=delay) as net,
        ray_nodes(net["big"], net["small"]) as ray_address,
    ):
        write_config(path, ray_address=ray_address, address=f"{net['big'].address}:50051")
        with Command(net["big"].command([*ORCHESTRATOR, "serve", str(path)]), env=ENV) as command:
            address = command.wait_for(r"event=serving .*address=(\S+)", START_S)[1]
            yield Service(net=net, command=command, address=address)


def write_config(path: Path, *, ray_address: str, address: str) -> None:
    """Three quarters of the demo model on big, one quarter on small."""
    workers = [{"name": name, "device": "cpu", "threads": 1, "node_labels": {LABEL: name}} for name in ("big", "small")]
    stage = {"workers": ["big", "small"], "tensor_split": [3, 1]}
    content = {
        "model": {"path": str(MODEL), "dtype": "float32"},
        "cluster": {"ray_address": ray_address, "bind_host": "0.0.0.0", "workers": workers},
        "serving": {"kv_cache": "16MiB", "parallelism": {"replicas": [{"stages": [stage]}]}},
        "gateway": {"address": address},
    }
    path.write_text(yaml.safe_dump(content))


def test_the_ranks_are_on_different_hosts(service: Service) -> None:
    ranks = re.findall(r"rank=(\d) node=(\S+) .*address=(\S+):\d+ ", service.ask("status"))
    hosts = [service.net[name] for name in ("big", "small")]
    assert ranks == [(str(rank), host.spec.name, host.address) for rank, host in enumerate(hosts)]


def test_small_sums_between_two_hosts_are_found_to_be_fastest_by_pairwise_exchange(service: Service) -> None:
    # It takes one latency; each other way takes two.
    service.command.wait_for(r"event=links source=\S.* stage=0 latency_ms=\S+ gb_per_s=", PATIENCE_S)
    found = re.findall(
        r"event=sum replica=replica-0 stage=0 num_bytes=(\d+) algorithm=(\S+)", service.ask("status", "--measured")
    )
    assert found[:3] == [("1024", "direct"), ("4096", "direct"), ("16384", "direct")]


async def test_a_cut_replica_answers_as_a_whole_one(service: Service, tmp_path: Path) -> None:
    whole = []
    config = make_config(tmp_path, MODEL)
    config = replace(config, model=replace(config.model, dtype="float32"))
    async with deploy(config) as deployment:
        for prompt in PROMPTS:
            request = pb.GenerateRequest(prompt=prompt, max_tokens=MAX_TOKENS)
            result = await asyncio.to_thread(stream_generate, deployment.address, request, timeout_s=PATIENCE_S)
            whole.append(result.text)
    for prompt, text in zip(PROMPTS, whole, strict=True):
        said = await asyncio.to_thread(service.ask, "generate", prompt, "--max-tokens", str(MAX_TOKENS))
        assert said.rstrip("\n") == text.rstrip("\n") != ""


async def test_a_request_ends_with_unavailable_when_its_hosts_are_cut_off_from_each_other(service: Service) -> None:
    args = ["generate", PROMPTS[0], "--max-tokens", "1900", "--min-tokens", "1900", "--address", service.address]
    async with own_time() as clock:
        with Command(service.net["big"].command([*ORCHESTRATOR, *args]), env=ENV) as generated:
            await asyncio.to_thread(generated.wait_for, r"\w+ \w+", PATIENCE_S)
            cut_s = clock.now_s
            service.net.partition("big", "small")
            code = await asyncio.to_thread(generated.process.wait, PATIENCE_S)
            took_s = clock.now_s - cut_s
            output = generated.output()
    assert code == 1 and "error: UNAVAILABLE" in output, output
    assert took_s < LOST_S
    await until(lambda: not [line for line in service.ours() if "-m workers" in line])
    words = r"event=replica replica=replica-0 phase=failed .*rank 1: is frozen or cut off"
    await asyncio.to_thread(service.command.wait_for, words, PATIENCE_S)


def test_a_service_that_has_no_replica_left_ends_with_1_and_leaves_nothing(service: Service) -> None:
    assert service.command.process.wait(STOP_S) == 1, service.command.output()
    last = service.command.output().rstrip().splitlines()[-1]
    assert last.startswith("error: no replica is left, and a lost one is not started again: rank "), last
    left = [line for line in service.ours() if line.startswith("big: ")]
    assert not left, left
    service.net.heal("big", "small")
    started_s = time.monotonic()
    while left := service.ours():
        # What Ray could not be told while it was cut off: its actor on the other host.
        assert time.monotonic() - started_s < PATIENCE_S, left
        time.sleep(0.1)
