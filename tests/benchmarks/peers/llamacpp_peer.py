"""llama.cpp as a peer: its own C interface, one batch of all sequences for each step, a bf16 GGUF.

Every case gets a context of just the size it needs, with a stream of KV for each sequence, which is what is fastest.
"""

import ctypes
import sys
import time
from importlib import metadata
from typing import Any

import llama_cpp.llama_cpp as llama
import numpy as np
from peer_protocol import Measure, prompts, serve

_BATCH = 2048
_STREAM_STEP = 256


class Failed(Exception):
    """llama.cpp refused; the text says what."""


def load(settings: dict[str, Any]) -> tuple[Measure, dict[str, str]]:
    llama.llama_backend_init()
    return measure_with(llama.llama_model_default_params(), settings)


def measure_with(params: Any, settings: dict[str, Any]) -> tuple[Measure, dict[str, str]]:
    """Load the model as ``params`` say. Raises Failed."""
    model = llama.llama_model_load_from_file(settings["model"].encode(), params)
    if model is None:
        raise Failed(f"{settings['model']} cannot be loaded")
    vocab_size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))

    def measure(case: dict[str, Any]) -> tuple[float, int]:
        context = Context(model, case, settings["threads"], vocab_size, micro_batch=settings.get("micro_batch"))
        try:
            return context.measure(case)
        finally:
            context.close()

    return measure, {"llama_cpp_python": metadata.version("llama-cpp-python")}


class Context:
    """A context and its one batch."""

    def __init__(
        self, model: int, case: dict[str, Any], threads: int, vocab_size: int, *, micro_batch: int | None = None
    ) -> None:
        tokens = case["num_tokens"] + case["num_steps"] + 1
        params = llama.llama_context_default_params()
        params.n_seq_max = case["num_sequences"]
        params.n_ctx = -(-tokens // _STREAM_STEP) * _STREAM_STEP * case["num_sequences"]
        params.n_batch = _BATCH
        if micro_batch is not None:
            params.n_ubatch = micro_batch
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = False
        self._context = llama.llama_init_from_model(model, params)
        if self._context is None:
            raise Failed(f"no context of {params.n_ctx} tokens")
        self._batch = llama.llama_batch_init(_BATCH, 0, 1)
        self._vocab_size = vocab_size

    def measure(self, case: dict[str, Any]) -> tuple[float, int]:
        batch = prompts(case, self._vocab_size)
        warm_up = [(batch[0][0], 0, 0, True)]
        self._decode(warm_up)
        llama.llama_memory_clear(llama.llama_get_memory(self._context), True)
        started = time.perf_counter()
        last = self._prefill(batch)
        if case["phase"] == "prefill":
            return time.perf_counter() - started, sum(map(len, batch))
        started = time.perf_counter()
        for step in range(case["num_steps"]):
            position = case["num_tokens"] + step
            last = self._decode([(token, position, sequence, True) for sequence, token in enumerate(last)])
        return time.perf_counter() - started, case["num_steps"] * case["num_sequences"]

    def _prefill(self, batch: list[list[int]]) -> list[int]:
        """The first token of each sequence."""
        rows = [
            (token, position, sequence, position == len(ids) - 1)
            for sequence, ids in enumerate(batch)
            for position, token in enumerate(ids)
        ]
        first: list[int] = []
        for start in range(0, len(rows), _BATCH):
            first += self._decode(rows[start : start + _BATCH])
        return first

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """Compute (token, position, sequence, whether to sample) rows; the most likely token where it was asked for."""
        self._batch.n_tokens = len(rows)
        for row, (token, position, sequence, samples) in enumerate(rows):
            self._batch.token[row] = token
            self._batch.pos[row] = position
            self._batch.n_seq_id[row] = 1
            self._batch.seq_id[row][0] = sequence
            self._batch.logits[row] = samples
        code = llama.llama_decode(self._context, self._batch)
        if code != 0:
            raise Failed(f"llama_decode returned {code}")
        return [self._most_likely(row) for row, (*_, samples) in enumerate(rows) if samples]

    def _most_likely(self, row: int) -> int:
        logits = llama.llama_get_logits_ith(self._context, row)
        address = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float))
        return int(np.ctypeslib.as_array(address, (self._vocab_size,)).argmax())

    def close(self) -> None:
        llama.llama_batch_free(self._batch)
        llama.llama_free(self._context)


if __name__ == "__main__":
    sys.exit(serve(load))
