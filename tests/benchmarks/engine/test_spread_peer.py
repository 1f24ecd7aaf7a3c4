"""The two parts of a peer load, freeze and end together, whatever happens to one of them or to their driver."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.benchmarks.engine.engine_cases import Case
from tests.benchmarks.engine.engine_peers import LOGS, PeerFailed
from tests.benchmarks.engine.spread_peer import Part, SpreadPeer
from tests.netlab.lab import Lab, lab
from tests.netlab.requirements import missing
from tests.netlab.specs import HostSpec

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(60),
    pytest.mark.skipif((reason := missing()) is not None, reason=reason or ""),
]

PEERS = Path(__file__).parents[1] / "peers"
REPOSITORY = Path(__file__).resolve().parents[3]
FAKE = """
import sys, time
from peer_protocol import end_with_parent, serve

end_with_parent()
print("up", file=sys.stderr, flush=True)

def measure(case):
    time.sleep(60.0 if case["num_steps"] == 2 else 0.0)
    return 0.5, case["num_steps"]

sys.exit(serve(lambda settings: (measure, {"fake": "1"})))
"""
DRIVER = """
import sys, time
from tests.benchmarks.engine.engine_peers import LOGS
from tests.benchmarks.engine.spread_peer import Part, SpreadPeer
from tests.netlab.lab import lab
from tests.netlab.specs import HostSpec
with lab(HostSpec(name="one"), HostSpec(name="two")) as net:
    asked, other = (Part(host=net[name], argv=[sys.executable, sys.argv[1]], environment={}) for name in ("one", "two"))
    peer = SpreadPeer("fake", asked=asked, other=other)
    while "up" not in (LOGS / "fake-other.log").read_text():
        time.sleep(0.01)
    peer.load(model="any")
    print("loaded", flush=True)
    sys.stdin.read()
"""
OTHER = "import sys; print('last words', flush=True); sys.stdin.read(); sys.exit(3)"


@pytest.fixture
def net() -> Iterator[Lab]:
    with lab(HostSpec(name="one"), HostSpec(name="two")) as made:
        yield made


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


def test_both_are_frozen_except_in_their_turns_and_end_together(spread: SpreadPeer) -> None:
    spread.load(model="any")
    processes = parts()
    assert len(processes) == 2
    for _ in range(2):
        assert comes_true(lambda: all(one.status() == psutil.STATUS_STOPPED for one in processes))
        assert spread.measure(Case(phase="decode", num_tokens=1, num_sequences=1, num_steps=1), 0).rate == 2.0
    spread.close()
    assert not any(one.is_running() for one in processes)


def test_a_measurement_ends_when_the_other_part_does(spread: SpreadPeer) -> None:
    spread.load(model="any")
    other = next(one for one in parts() if "last words" in " ".join(one.cmdline()))
    other.kill()
    with pytest.raises(PeerFailed, match=r"part on two ended with exit code -9.*last words"):
        spread.measure(Case(phase="decode", num_tokens=1, num_sequences=1, num_steps=2), 0)


def test_frozen_parts_of_a_killed_driver_end(tmp_path: Path) -> None:
    (tmp_path / "fake_peer.py").write_text(FAKE)
    argv = [sys.executable, "-c", DRIVER, str(tmp_path / "fake_peer.py")]
    env = os.environ | {"PYTHONPATH": f"{PEERS}:{REPOSITORY}"}
    pipe = subprocess.PIPE
    with subprocess.Popen(argv, cwd=tmp_path, env=env, stdin=pipe, stdout=pipe, text=True) as driver:
        assert driver.stdout is not None and driver.stdout.readline() == "loaded\n"
        children = psutil.Process(driver.pid).children()
        frozen = [one for one in children if "fake_peer.py" in " ".join(one.cmdline())]
        driver.kill()
    assert len(frozen) == 2
    assert comes_true(lambda: not any(one.is_running() for one in frozen))


def test_a_server_that_ends_before_it_listens_is_a_failure(
    net: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = [sys.executable, "-c", "import sys; sys.exit('no such address')"]
    part = Part(host=net["two"], argv=argv, environment={})
    with pytest.raises(PeerFailed, match=r"part on two ended with exit code 1.*no such address"):
        SpreadPeer("fake", asked=part, other=part, port=1)
