"""Sends prompts to a service all at once, from wherever this runs: ``ask_tokens.py ADDRESS < REQUESTS.JSON``.

It reads a list of objects with ``prompt_ids`` and ``max_tokens``, and writes one with the answers, in the same order.
"""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from orchestrator.cli.client import stream_generate
from protos.heterodyne.v1 import inference_pb2 as pb
from tests.support.clocks import PATIENCE_S


def ask(address: str, wanted: dict[str, Any]) -> dict[str, Any]:
    """The tokens of a greedy answer, who computed it and its prompt, and how many tokens' keys and values were sent."""
    request = pb.GenerateRequest(
        prompt_ids=pb.TokenIds(ids=wanted["prompt_ids"]),
        max_tokens=wanted["max_tokens"],
        sampling=pb.SamplingParams(temperature=0.0),
        ignore_eos=True,
    )
    result = stream_generate(address, request, timeout_s=2 * PATIENCE_S)
    return {
        "token_ids": [token.id for token in result.choices[0].tokens],
        "replica": result.finished.replica,
        "prefill_replica": result.finished.prefill_replica,
        "num_sent_tokens": result.finished.transfer.num_tokens,
    }


if __name__ == "__main__":
    requests = json.load(sys.stdin)
    with ThreadPoolExecutor(len(requests)) as clients:
        print(json.dumps(list(clients.map(lambda wanted: ask(sys.argv[1], wanted), requests))))
