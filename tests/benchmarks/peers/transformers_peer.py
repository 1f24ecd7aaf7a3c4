"""transformers as a peer: static batches, its own KV cache, torch's scaled_dot_product_attention."""

import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from peer_protocol import Measure, prompts, serve
from transformers import AutoModelForCausalLM


def load(settings: dict[str, Any]) -> tuple[Measure, dict[str, str]]:
    torch.set_num_threads(settings["threads"])
    path = Path(settings["model"])
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, attn_implementation="sdpa").eval()

    @torch.inference_mode()
    def measure(case: dict[str, Any]) -> tuple[float, int]:
        ids = torch.tensor(prompts(case, model.config.vocab_size))
        started = time.perf_counter()
        output = model(ids, use_cache=True, logits_to_keep=1)
        tokens = output.logits[:, -1].argmax(dim=-1, keepdim=True)  # [B, 1]
        if case["phase"] == "prefill":
            return time.perf_counter() - started, ids.numel()
        started = time.perf_counter()
        for _ in range(case["num_steps"]):
            output = model(tokens, past_key_values=output.past_key_values, use_cache=True)
            tokens = output.logits[:, -1].argmax(dim=-1, keepdim=True)
            tokens.tolist()  # as generation does, to look for the end of a sequence
        return time.perf_counter() - started, case["num_steps"] * case["num_sequences"]

    return measure, {"transformers": transformers.__version__, "transformers_torch": torch.__version__}


if __name__ == "__main__":
    sys.exit(serve(load))
