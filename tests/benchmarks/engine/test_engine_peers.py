"""Peers are driven over pipes, frozen between their turns, and left out with a reason when they fail."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from kernels.cpu.machine.target import NAMES, VARIABLE
from tests.benchmarks.engine.engine_cases import LINEARS, Case, Sample
from tests.benchmarks.engine.engine_peers import HELD_BACK, Peer, PeerFailed, python_of, recipe
from tests.benchmarks.make_peers import llama_flags, wanted

PEERS = Path(__file__).parents[1] / "peers"
CASE = Case(phase="decode", num_tokens=4, num_sequences=2, num_steps=3)
FAKE = """
import sys
from peer_protocol import prompts, serve

def load(settings):
    print("noise on standard output")
    if settings["model"] == "broken":
        raise ValueError("no such model")
    return measure, {"fake": "1"}

def measure(case):
    if case["num_sequences"] == 3:
        raise RuntimeError("three is too many\\nat all")
    if case["num_sequences"] == 4:
        print("last words", file=sys.stderr)
        sys.exit(7)
    ids = prompts(case, vocab_size=100)
    assert [len(row) for row in ids] == [case["num_tokens"]] * case["num_sequences"]
    return 0.5, case["num_steps"] * case["num_sequences"]

sys.exit(serve(load))
"""


@pytest.fixture
def peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Peer]:
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "fake_peer.py"
    script.write_text(FAKE)
    fake = Peer("fake", [sys.executable, str(script)], environment={"PYTHONPATH": str(PEERS)})
    yield fake
    fake.close()


def processes_of(peer: Peer) -> list[psutil.Process]:
    return [child for child in psutil.Process().children(recursive=True) if "fake_peer.py" in " ".join(child.cmdline())]


def comes_to(process: psutil.Process, status: str) -> bool:
    """Signals take a moment."""
    deadline = time.monotonic() + 10.0
    while process.status() != status and time.monotonic() < deadline:
        time.sleep(0.01)
    return process.status() == status


def test_peer_loads_measures_and_is_frozen_in_between(peer: Peer) -> None:
    peer.load(model="any")
    (process,) = processes_of(peer)
    assert peer.versions == {"fake": "1"}
    assert comes_to(process, psutil.STATUS_STOPPED)
    assert peer.measure(CASE, seed=1) == Sample(seconds=0.5, tokens=6)
    assert comes_to(process, psutil.STATUS_STOPPED)
    peer.close()
    assert not process.is_running()


def test_peer_that_cannot_load_or_measure_says_why_in_one_line(peer: Peer) -> None:
    with pytest.raises(PeerFailed, match=r"^ValueError: no such model$"):
        peer.load(model="broken")
    peer.load(model="any")
    with pytest.raises(PeerFailed, match=r"^RuntimeError: three is too many$"):
        peer.measure(Case(phase="decode", num_tokens=4, num_sequences=3), seed=1)
    assert peer.measure(CASE, seed=1).tokens == 6


def test_peer_that_ends_is_reported_with_its_exit_code_and_last_words(peer: Peer) -> None:
    peer.load(model="any")
    with pytest.raises(PeerFailed, match=r"exit code 7.*last words"):
        peer.measure(Case(phase="decode", num_tokens=4, num_sequences=4), seed=1)


def test_peer_that_is_not_installed_names_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PeerFailed, match="make bench-peers"):
        python_of("vllm")
    with pytest.raises(PeerFailed, match=r'make bench-peers BENCH_ARGS="--llama-target avx2"$'):
        python_of("llamacpp-avx2")


def test_peers_are_kept_to_the_instructions_of_a_lesser_cpu_or_left_out() -> None:
    environment = recipe("transformers", "avx2").environment
    assert environment["ONEDNN_MAX_CPU_ISA"] == "AVX2" and environment["ATEN_CPU_CAPABILITY"] == "avx2"
    assert recipe(LINEARS, "avx2").environment == {**recipe(LINEARS).environment, VARIABLE: "avx2"}
    assert (recipe("llamacpp").venv, recipe("llamacpp", "avx2").venv) == ("llamacpp", "llamacpp-avx2")
    assert recipe("vllm").venv == "vllm"
    with pytest.raises(PeerFailed, match="cannot be kept to that for avx2"):
        recipe("vllm", "avx2")
    assert set(HELD_BACK) == set(NAMES)


def test_a_llama_cpp_of_its_own_is_built_for_a_lesser_cpu() -> None:
    assert [environment.name for environment in wanted([])] == ["transformers", "vllm", "llamacpp"]
    *_, plain, lesser = wanted(["--llama-target", "avx2"])
    assert plain.variables["CMAKE_ARGS"] == "-DGGML_RPC=ON" and lesser.name == recipe("llamacpp", "avx2").venv
    flags = lesser.variables["CMAKE_ARGS"].split()
    assert {"-DGGML_RPC=ON", "-DGGML_NATIVE=OFF", "-DGGML_AVX2=ON", "-DGGML_FMA=ON", "-DGGML_AVX512=OFF"} <= {*flags}
    assert not [flag for flag in llama_flags("generic") if flag.endswith("=ON")]


@pytest.fixture
def installed() -> Callable[[str], Path]:
    def find(name: str) -> Path:
        try:
            return python_of(name)
        except PeerFailed as error:
            pytest.skip(str(error))

    return find


@pytest.mark.integration
def test_llamacpp_computes_the_model_that_the_checkpoint_holds(
    tmp_path: Path, installed: Callable[[str], Path]
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from tests.benchmarks.engine.engine_models import checkpoint

    python = installed("llamacpp")
    model = checkpoint("tiny", directory=tmp_path)
    file = tmp_path / "tiny.gguf"
    subprocess.run([str(python), str(PEERS / "write_gguf.py"), str(model), str(file)], check=True)
    ask = """
import json, sys
import llama_cpp.llama_cpp as llama
import llamacpp_peer
from peer_protocol import prompts
llama.llama_backend_init()
model = llama.llama_model_load_from_file(sys.argv[1].encode(), llama.llama_model_default_params())
case = {"phase": "prefill", "num_tokens": 40, "num_sequences": 3, "num_steps": 1, "seed": 5}
ids = prompts(case, 32000)
print(json.dumps([ids, llamacpp_peer.Context(model, case, 1, 32000)._prefill(ids)]))
"""
    done = subprocess.run(
        [str(python), "-c", ask, str(file)], env={"PYTHONPATH": str(PEERS)}, check=True, capture_output=True, text=True
    )
    ids, theirs = json.loads(done.stdout.splitlines()[-1])
    oracle = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.inference_mode():
        assert oracle(torch.tensor(ids)).logits[:, -1].argmax(dim=-1).tolist() == theirs
