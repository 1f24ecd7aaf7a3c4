"""Other engines over two emulated hosts: llama.cpp's splits compute its model, and their steps cross the link."""

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.engine.engine_models import checkpoint
from tests.benchmarks.engine.engine_peers import PeerFailed, python_of
from tests.benchmarks.engine.spread_engine import PeerFigures, Unavailable, Work
from tests.benchmarks.engine.spread_peer import is_listening
from tests.benchmarks.parallel import parallel_peers
from tests.benchmarks.parallel.parallel_peers import (
    LLAMACPP,
    Halves,
    Split,
    llamacpp_rpc,
    measure_llamacpp,
    measure_vllm,
)
from tests.netlab.lab import Host, Lab, lab
from tests.netlab.requirements import missing
from tests.netlab.specs import HostSpec, LinkConditions

PEERS = Path(__file__).parents[1] / "peers"
SMALL = Work(batches=(1, 2), prompts=(8,), num_steps=3, context=4, repeats=2)
DELAY_S = 0.02
LISTEN_S = 20.0


def emulated(test: Callable[..., None]) -> Callable[..., None]:
    """Marks of a test that needs two hosts."""
    reason = missing()
    for mark in (
        pytest.mark.integration,
        pytest.mark.timeout(60),
        pytest.mark.skipif(bool(reason), reason=reason or ""),
    ):
        test = mark(test)
    return test


def test_splits_are_named_by_what_is_remote() -> None:
    assert Split(remote_layers=11).name == "11 layers and the output remote"
    assert Split(remote_layers=3, is_output_remote=False).name == "3 layers remote"
    assert Halves(split="layer", micro_batch=128).name == "halves by layer, 128 tokens at once"
    assert len({split.name for split in parallel_peers.SPLITS}) == len(parallel_peers.SPLITS)


def test_engines_that_are_not_installed_are_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    nowhere = Lab((), None)  # type: ignore[arg-type]
    for found in (measure_llamacpp(nowhere, tmp_path), measure_vllm(nowhere, tmp_path)):
        assert isinstance(found, Unavailable) and "make bench-peers" in found.reason


@pytest.fixture
def net() -> Iterator[Lab]:
    with lab(HostSpec(name="one"), HostSpec(name="two")) as made:
        yield made


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    """Of the tiny shape, two layers."""
    try:
        python = python_of("llamacpp")
    except PeerFailed as error:
        pytest.skip(str(error))
    file = tmp_path / "tiny.gguf"
    model = checkpoint("tiny", directory=tmp_path)
    subprocess.run([str(python), str(PEERS / "write_gguf.py"), str(model), str(file)], check=True, timeout=30)
    return file


FIRST_TOKENS = """
import json, sys
import llama_cpp.llama_cpp as llama
import llamacpp_peer, llamacpp_rpc_peer
from peer_protocol import prompts
settings = json.loads(sys.argv[2])
llama.llama_backend_init()
params, kept = llamacpp_rpc_peer.parameters(settings) if settings else (llama.llama_model_default_params(), None)
model = llama.llama_model_load_from_file(sys.argv[1].encode(), params)
case = {"phase": "prefill", "num_tokens": 40, "num_sequences": 3, "num_steps": 1, "seed": 5}
micro_batch = settings and settings["micro_batch"]
context = llamacpp_peer.Context(model, case, 1, 32000, micro_batch=micro_batch)
print(json.dumps(context._prefill(prompts(case, 32000))))
"""


def first_tokens(host: Host, gguf: Path, settings: dict[str, Any] | None) -> list[int]:
    """What llama.cpp makes of three prompts, undivided where there are no settings."""
    argv = [str(python_of("llamacpp")), "-c", FIRST_TOKENS, str(gguf), json.dumps(settings)]
    done = host.run(argv, env=os.environ | {"PYTHONPATH": str(PEERS)}, timeout_s=30.0)
    tokens: list[int] = json.loads(done.stdout.splitlines()[-1])
    return tokens


@emulated
def test_every_step_of_llamacpp_crosses_the_link(net: Lab, gguf: Path) -> None:
    splits = (Split(remote_layers=1), Halves(split="layer", micro_batch=4))
    with llamacpp_rpc(net, gguf, splits=splits) as opened:
        assert (opened.layouts, opened.left_out) == (tuple(split.name for split in splits), {})
        near = opened.measure(SMALL)
        net.change(LinkConditions(delay_s=DELAY_S))
        far = opened.measure(SMALL)
    assert isinstance(near, PeerFigures) and isinstance(far, PeerFigures)
    assert "llama_cpp_python" in near.versions
    for batch in SMALL.batches:
        slow = [rate for rates in far.decode[batch].samples.values() for rate in rates]
        assert max(slow) <= batch / (2 * DELAY_S)
        assert near.decode[batch].metric.value > far.decode[batch].metric.value
    assert max(far.prefill[8].samples[splits[0].name]) <= 8 / (2 * DELAY_S)


@emulated
@pytest.mark.parametrize(
    "split",
    [
        Split(remote_layers=1),
        Split(remote_layers=1, is_output_remote=False),
        Halves(split="layer", micro_batch=16),
        Halves(split="tensor"),
    ],
    ids=lambda split: split.name.replace(" ", "-"),
)
def test_a_split_of_llamacpp_computes_the_same_model(net: Lab, gguf: Path, split: Split | Halves) -> None:
    address, port = net["two"].address, 50052
    argv = [str(python_of("llamacpp")), str(PEERS / "rpc_server.py"), f"{address}:{port}", "1"]
    quiet = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = net["two"].popen(argv, **quiet)
    deadline_s = time.monotonic() + LISTEN_S
    while not is_listening(server.pid, address, port):
        assert time.monotonic() < deadline_s, "the server does not listen"
        time.sleep(0.05)
    settings = split.settings(f"{net['one'].address}:{port}") | {"endpoint": f"{address}:{port}", "threads": 1}
    assert first_tokens(net["one"], gguf, settings) == first_tokens(net["one"], gguf, None)


@emulated
def test_llamacpp_without_its_file_is_unavailable(net: Lab, gguf: Path) -> None:
    gguf.unlink()
    found = measure_llamacpp(net, gguf, SMALL, splits=(Split(remote_layers=1),))
    assert isinstance(found, Unavailable) and found.engine == LLAMACPP
    assert "cannot be loaded" in found.reason
