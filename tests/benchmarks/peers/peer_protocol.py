"""How a peer is driven: one JSON object a line on standard input, one answer a line on standard output.

``{"load": {"model", "threads", "max_context", "max_sequences"}}`` is answered by ``{"versions": {...}}``, and
``{"measure": {"phase", "num_tokens", "num_sequences", "num_steps", "seed"}}`` by ``{"seconds", "tokens"}``; either by
``{"error": cause}``. Runs in the peer's own virtual environment, so it needs the standard library alone.
"""

import ctypes
import json
import os
import random
import signal
import sys
from collections.abc import Callable
from typing import Any

Measure = Callable[[dict[str, Any]], tuple[float, int]]
Load = Callable[[dict[str, Any]], tuple[Measure, dict[str, str]]]

# Ids below are special in most vocabularies.
_FIRST_ID = 3
_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Be killed when the thread that started this process ends, also while frozen. Linux alone has that."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def serve(load: Load) -> int:
    """Answer until standard input ends."""
    # Libraries print to standard output; whatever they say goes with the log.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    measure: Measure | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "load" in request:
                measure, versions = load(request["load"])
                answer: dict[str, Any] = {"versions": versions}
            else:
                assert measure is not None, "measure before load"
                seconds, tokens = measure(request["measure"])
                answer = {"seconds": seconds, "tokens": tokens}
        except Exception as error:  # whatever a library raises, the benchmark goes on without this peer
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:400]}
        answers.write(json.dumps(answer) + "\n")
    return 0


def prompts(case: dict[str, Any], vocab_size: int) -> list[list[int]]:
    """The prompts of a case: random, so that none shares a prefix with another."""
    draw = random.Random(case["seed"])
    return [
        [draw.randrange(_FIRST_ID, vocab_size) for _ in range(case["num_tokens"])] for _ in range(case["num_sequences"])
    ]
