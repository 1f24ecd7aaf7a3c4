"""``make fleet-demo``: deploy/fleet.yaml as one Ray job on unequal hosts, some requests, and a picture of one."""

import os
import signal
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor

from orchestrator.cli.demo import Family
from tests.netlab.fleet import FILE, LINKS, SPEEDS, Cluster, cluster, job, nodes, why_not_emulated, workers
from tests.netlab.system import NAMESPACES, PREFIX
from tests.support.deploying.service import REPOSITORY

OUTPUT = REPOSITORY / "build/fleet"
LONG_CHARACTERS = 2400
SHORT_PROMPTS = (
    "And it came to pass in those days, that there went out a decree from Caesar Augustus,",
    "The wise man said unto the king, Let there be a house built for the name of the LORD,",
    "In the beginning was the Word, and the Word was with God, and the Word was God. And",
    "And the LORD said unto Moses, Go in unto Pharaoh, and tell him, Thus saith the LORD,",
)
_WIDTH = 110


def main() -> int:
    """Runs the demo. Returns the exit code: 1 where something of it is left."""
    started_s = time.monotonic()

    def say(words: str) -> None:
        _say(f"{words} after {time.monotonic() - started_s:.0f} s")

    OUTPUT.mkdir(parents=True, exist_ok=True)
    family = Family(os.getpid())
    _say_where()
    with cluster(is_emulated=why_not_emulated() is None) as there:
        say(f"Ray runs, and {FILE.relative_to(REPOSITORY)} is submitted,")
        with job(there) as submitted:
            for line in submitted.output().splitlines():
                if any(f"event={event} " in line for event in ("plan", "plan_attention", "attention_offload", "roles")):
                    print(line)
            say("it serves")
            family.look()
            _use(there)
            family.look()
        say("the job has stopped")
    left = _left(family)
    say(f"{len(family.seen)} processes have ended, left: {', '.join(left) or 'none'};")
    return 1 if left else 0


def _say(words: str) -> None:
    print(f"--- {words} ---", flush=True)


def _say_where() -> None:
    reason = why_not_emulated()
    if reason is not None:
        _say(f"all {len(workers())} workers run as processes of this machine, because {reason}")
        return
    rate = f"{(LINKS.rate_bits_per_s or 0) / 1e9:g} Gbit/s, {LINKS.delay_s * 1e3:g} ms each way"
    _say(f"{len(nodes())} emulated hosts, links of {rate}")
    for worker in workers():
        node = str(worker["node"])
        print(f"{node}: {SPEEDS[node]:g} of a core, {worker['memory']} for worker {worker['name']}")


def _use(there: Cluster) -> None:
    """Sends the requests, and shows what the service says of them."""
    text = (REPOSITORY / "deploy/demo/heldout.txt").read_text()[:LONG_CHARACTERS]
    _say(f"{len(SHORT_PROMPTS)} short prompts at once")
    with ThreadPoolExecutor(len(SHORT_PROMPTS)) as clients:
        for shown in clients.map(lambda prompt: _generate(there, prompt, 48), SHORT_PROMPTS):
            print(shown)
    _say("a long prompt")
    print(_generate(there, text, 64))
    print(there.ask("timeline", str(OUTPUT / "timeline.json"), "--svg", str(OUTPUT / "request.svg")).stdout, end="")
    _say("what ran where")
    print(there.ask("status", "--measured").stdout, end="")


def _generate(there: Cluster, prompt: str, max_tokens: int) -> str:
    """Returns the answer in one line, and what it took in another."""
    done = there.ask("generate", "--max-tokens", str(max_tokens), "--temperature", "0", "--", prompt)
    asked = textwrap.shorten(prompt, 40, placeholder="...")
    return f"{asked} -> {textwrap.shorten(done.stdout, _WIDTH, placeholder='...')}\n    {done.stderr.strip()}"


def _left(family: Family) -> list[str]:
    """Returns the processes and namespaces of ours that are still there after a moment to end."""
    ours = f"{PREFIX}-{os.getpid()}-"
    namespaces = sorted(path.name for path in NAMESPACES.glob(f"{ours}*")) if NAMESPACES.is_dir() else []
    return [*family.alive(), *namespaces]


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # as after Ctrl-C, so that nothing is left
    sys.exit(main())
