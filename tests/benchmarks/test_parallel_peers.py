"""Engines over two emulated hosts: figures, parts that end together, and llama.cpp's layers behind its RPC server."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.benchmarks import parallel_peers
from tests.benchmarks.engine_cases import Case, Sample
from tests.benchmarks.engine_models import checkpoint
from tests.benchmarks.engine_peers import LOGS, PeerFailed, python_of
from tests.benchmarks.parallel_peers import LLAMACPP, Halves, Split, llamacpp_rpc, measure_llamacpp, measure_vllm
from tests.benchmarks.spread_engine import Engine, PeerFigures, Rates, Unavailable, Work, best, best_layouts, engine
from tests.benchmarks.spread_peer import Part, SpreadPeer, is_listening
from tests.netlab.lab import Host, Lab, lab
from tests.netlab.requirements import missing
from tests.netlab.specs import HostSpec, LinkConditions

PEERS = Path(__file__).parent / "peers"
REPOSITORY = Path(__file__).resolve().parents[2]
SMALL = Work(batches=(1, 2), prompts=(8,), num_steps=3, context=4, repeats=2)
DELAY_S = 0.02
emulated = [
    pytest.mark.integration,
    pytest.mark.timeout(60),
    pytest.mark.skipif((reason := missing()) is not None, reason=reason or ""),
]


class FakePeer:
    """Stands for a loaded peer, whose rates are told."""

    def __init__(self, *rates: float) -> None:
        self.versions = {"fake": "1"}
        self.asked: list[tuple[Case, int]] = []
        self.is_closed = False
        self._rates = list(rates)

    def measure(self, case: Case, seed: int) -> Sample:
        self.asked.append((case, seed))
        if not self._rates:
            raise PeerFailed("it had enough")
        return Sample(seconds=1.0, tokens=int(self._rates.pop(0)))

    def close(self) -> None:
        self.is_closed = True


def fake_engine(**peers: FakePeer) -> Engine:
    return Engine("fake", peers, left_out={"third": "too large"})  # type: ignore[arg-type]


def test_layouts_take_turns_and_the_one_with_the_best_median_counts() -> None:
    one, two = FakePeer(10, 30, 20), FakePeer(11, 12, 90)
    rates = fake_engine(one=one, two=two).decode(batch=8, steps=5, context=7)
    assert rates == Rates(layout="one", samples={"one": (10.0, 30.0, 20.0), "two": (11.0, 12.0, 90.0)})
    assert (rates.metric.value, rates.metric.samples, rates.metric.spread) == (20.0, 3, (10.0, 30.0))
    case = Case(phase="decode", num_tokens=7, num_sequences=8, num_steps=5)
    assert one.asked == two.asked == [(case, 0), (case, 1), (case, 2)]


def test_figures_hold_every_case_and_what_was_left_out() -> None:
    figures = fake_engine(one=FakePeer(*range(1, 7))).measure(SMALL)
    assert isinstance(figures, PeerFigures)
    assert {batch: rates.samples["one"] for batch, rates in figures.decode.items()} == {1: (1.0, 2.0), 2: (3.0, 4.0)}
    assert figures.prefill[8].metric.value == 5.5
    assert (figures.versions, figures.left_out) == ({"fake": "1"}, {"third": "too large"})


def test_an_engine_that_fails_is_unavailable_and_says_why() -> None:
    assert fake_engine(one=FakePeer(1)).measure(SMALL) == Unavailable(engine="fake", reason="it had enough")


def test_layouts_that_are_never_best_can_be_ended() -> None:
    one, two, three = FakePeer(), FakePeer(), FakePeer()
    fakes = fake_engine(one=one, two=two, three=three)
    figures = PeerFigures(
        engine="fake",
        decode={1: best({"one": (2.0,), "two": (1.0,), "three": (1.0,)})},
        prefill={8: best({"one": (1.0,), "two": (1.0,), "three": (3.0,)})},
    )
    fakes.narrow(best_layouts(figures))
    assert fakes.layouts == ("one", "three")
    assert (one.is_closed, two.is_closed, three.is_closed) == (False, True, False)


def test_a_layout_that_cannot_be_loaded_is_left_out_and_none_at_all_is_a_failure() -> None:
    peer = FakePeer(1)

    def start(number: int, layout: str) -> SpreadPeer:
        if layout == "bad":
            raise PeerFailed(f"no memory for number {number}")
        return peer  # type: ignore[return-value]

    with engine("fake", {"one": "good", "two": "bad"}, start) as opened:
        assert opened.layouts == ("one",)
        assert opened.left_out == {"two": "no memory for number 1"}
    assert peer.is_closed
    with pytest.raises(PeerFailed, match=r"^one: no memory for number 0$"), engine("fake", {"one": "bad"}, start):
        pass


def test_splits_are_named_by_what_is_remote() -> None:
    assert Split(remote_layers=11).name == "11 layers and the output remote"
    assert Split(remote_layers=3, is_output_remote=False).name == "3 layers remote"
    assert Halves(split="layer", micro_batch=128).name == "halves by layer, 128 tokens at once"
    assert len({split.name for split in parallel_peers.SPLITS}) == len(parallel_peers.SPLITS)


@pytest.fixture
def net() -> Iterator[Lab]:
    with lab(HostSpec(name="one"), HostSpec(name="two")) as made:
        yield made


FAKE = """
import sys, time
from peer_protocol import end_with_parent, serve

end_with_parent()

def measure(case):
    time.sleep(60.0 if case["num_steps"] == 2 else 0.0)
    return 0.5, case["num_steps"]

sys.exit(serve(lambda settings: (measure, {"fake": "1"})))
"""
DRIVER = """
import sys
from tests.benchmarks.spread_peer import Part, SpreadPeer
from tests.netlab.lab import lab
from tests.netlab.specs import HostSpec
with lab(HostSpec(name="one"), HostSpec(name="two")) as net:
    asked, other = (Part(host=net[name], argv=[sys.executable, sys.argv[1]], environment={}) for name in ("one", "two"))
    peer = SpreadPeer("fake", asked=asked, other=other)
    peer.load(model="any")
    print("loaded", flush=True)
    sys.stdin.read()
"""
OTHER = "import sys; print('last words', flush=True); sys.stdin.read(); sys.exit(3)"


@pytest.fixture
def spread(net: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SpreadPeer]:
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "fake_peer.py"
    script.write_text(FAKE)
    asked = Part(host=net["one"], argv=[sys.executable, str(script)], environment={"PYTHONPATH": str(PEERS)})
    other = Part(host=net["two"], argv=[sys.executable, "-c", OTHER], environment={})
    peer = SpreadPeer("fake", asked=asked, other=other)
    assert comes_true(lambda: "last words" in (LOGS / "fake-other.log").read_text())
    yield peer
    peer.close()


def parts() -> list[psutil.Process]:
    """Those of the fake, once each is what it was started as."""
    found = psutil.Process().children()
    return [one for one in found if any(text in " ".join(one.cmdline()) for text in ("fake_peer.py", "last words"))]


def comes_true(true: Callable[[], bool]) -> bool:
    """Signals take a moment."""
    deadline_s = time.monotonic() + 10.0
    while not true() and time.monotonic() < deadline_s:
        time.sleep(0.01)
    return true()


class TestParts:
    pytestmark = emulated

    def test_both_are_frozen_except_in_their_turns_and_end_together(self, spread: SpreadPeer) -> None:
        spread.load(model="any")
        processes = parts()
        assert len(processes) == 2
        for _ in range(2):
            assert comes_true(lambda: all(one.status() == psutil.STATUS_STOPPED for one in processes))
            assert spread.measure(Case(phase="decode", num_tokens=1, num_sequences=1, num_steps=1), 0).rate == 2.0
        spread.close()
        assert not any(one.is_running() for one in processes)

    def test_a_measurement_ends_when_the_other_part_does(self, spread: SpreadPeer) -> None:
        spread.load(model="any")
        other = next(one for one in parts() if "last words" in " ".join(one.cmdline()))
        other.kill()
        with pytest.raises(PeerFailed, match=r"part on two ended with exit code -9.*last words"):
            spread.measure(Case(phase="decode", num_tokens=1, num_sequences=1, num_steps=2), 0)

    def test_frozen_parts_of_a_killed_driver_end(self, tmp_path: Path) -> None:
        (tmp_path / "fake_peer.py").write_text(FAKE)
        argv = [sys.executable, "-c", DRIVER, str(tmp_path / "fake_peer.py")]
        env = os.environ | {"PYTHONPATH": f"{PEERS}:{REPOSITORY}"}
        with subprocess.Popen(argv, cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True) as driver:
            assert driver.stdout is not None and driver.stdout.readline() == "loaded\n"
            children = psutil.Process(driver.pid).children()
            frozen = [one for one in children if "fake_peer.py" in " ".join(one.cmdline())]
            driver.kill()
        assert len(frozen) == 2
        assert comes_true(lambda: not any(one.is_running() for one in frozen))

    def test_a_server_that_ends_before_it_listens_is_a_failure(
        self, net: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        argv = [sys.executable, "-c", "import sys; sys.exit('no such address')"]
        part = Part(host=net["two"], argv=argv, environment={})
        with pytest.raises(PeerFailed, match=r"part on two ended with exit code 1.*no such address"):
            SpreadPeer("fake", asked=part, other=part, port=1)


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


class TestLlamaCpp:
    pytestmark = emulated

    def test_every_step_of_llamacpp_crosses_the_link(self, net: Lab, gguf: Path) -> None:
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
    def test_a_split_of_llamacpp_computes_the_same_model(self, net: Lab, gguf: Path, split: Split | Halves) -> None:
        address, port = net["two"].address, 50052
        argv = [str(python_of("llamacpp")), str(PEERS / "rpc_server.py"), f"{address}:{port}", "1"]
        quiet = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        server = net["two"].popen(argv, **quiet)
        assert comes_true(lambda: is_listening(server.pid, address, port))
        settings = split.settings(f"{net['one'].address}:{port}") | {"endpoint": f"{address}:{port}", "threads": 1}
        assert first_tokens(net["one"], gguf, settings) == first_tokens(net["one"], gguf, None)

    def test_llamacpp_without_its_file_is_unavailable(self, net: Lab, gguf: Path) -> None:
        gguf.unlink()
        found = measure_llamacpp(net, gguf, SMALL, splits=(Split(remote_layers=1),))
        assert isinstance(found, Unavailable) and found.engine == LLAMACPP
        assert "cannot be loaded" in found.reason


def test_engines_that_are_not_installed_are_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    nowhere = Lab((), None)  # type: ignore[arg-type]
    for found in (measure_llamacpp(nowhere, tmp_path), measure_vllm(nowhere, tmp_path)):
        assert isinstance(found, Unavailable) and "make bench-peers" in found.reason
