"""Whole steps of a model of random weights, ours and those of transformers."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from kernels.cuda.variant import open_kernels
from placement.model.hf import read_model_spec
from placement.model.weights import EMBEDDING, whole_model
from tests.support.captures import run_again
from tests.support.triton.triton_cases import DEVICE, HAS_GPU
from tests.support.triton.triton_runner import compute, hidden, lay_out
from workers.host.device import open_device
from workers.model.kv_cache import allocate_kv_cache
from workers.step.graphs import CudaCapture, DecodeGraphs, StepMemory
from workers.step.runner import ModelRunner
from workers.step.types import SequenceInput

DTYPE = torch.bfloat16


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSizes:
    """A model by its configuration, and what it is to compute."""

    config: dict[str, Any]
    batches: tuple[int, ...] = (1, 16, 128)
    context: int = 1024
    prompt: int = 2048


_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "tie_word_embeddings": False,
    "max_position_embeddings": 8192,
    "eos_token_id": 2,
}
LLAMA_8B = ModelSizes(
    config=_LLAMA
    | {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
    }
)
SMALL = ModelSizes(
    config=_LLAMA
    | {
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "vocab_size": 128,
    },
    batches=(1, 3),
    context=16,
    prompt=20,
)


class OurModel:
    """Steps of a runner."""

    def __init__(self, sizes: ModelSizes) -> None:
        self._sizes = sizes
        model = read_model_spec(sizes.config, None)
        weights = {
            tensor.name: torch.randn(tensor.shape, device=DEVICE, dtype=DTYPE) * 0.02 for tensor in whole_model(model)
        }
        self.read_bytes = sum(weight.nbytes for name, weight in weights.items() if name != EMBEDDING)
        self.kv_bytes_per_token = 2 * model.num_layers * model.num_kv_heads * model.head_dim * DTYPE.itemsize
        num_slots = max(max(sizes.batches) * sizes.context, sizes.prompt)
        device = open_device("cuda:0" if HAS_GPU else "cpu", 1)
        cache = allocate_kv_cache(model, num_slots=num_slots, dtype=DTYPE, device=device)
        kernels = open_kernels(DEVICE)
        self._runner = ModelRunner(model=model, weights=weights, cache=cache, device=DEVICE, kernels=kernels)
        inputs = StepMemory(
            like=lay_out(self._runner, self._decodes(1)), max_decodes=max(sizes.batches), max_tokens=num_slots
        )
        self._graphs = DecodeGraphs(
            compute=partial(compute, self._runner),
            inputs=inputs,
            capture=CudaCapture(DEVICE) if HAS_GPU else run_again,
            sizes=sizes.batches,
        )

    def _decodes(self, batch: int) -> list[SequenceInput]:
        length = self._sizes.context
        return [
            SequenceInput(token_ids=[7 + i], start=length - 1, runs=((i * length, (i + 1) * length),))
            for i in range(batch)
        ]

    def decode(self, batch: int) -> Callable[[], object]:
        """A step of decodes, by graph."""
        tokens = lay_out(self._runner, self._decodes(batch))
        return lambda: self._graphs(tokens)

    def eager_decode(self, batch: int) -> Callable[[], object]:
        """The same, launched kernel by kernel."""
        return partial(compute, self._runner, lay_out(self._runner, self._decodes(batch)))

    def laid_out_decode(self, batch: int) -> Callable[[], object]:
        """The same by graph, from the sequences on."""
        parts = self._decodes(batch)
        return lambda: self._graphs(lay_out(self._runner, parts))

    def prefill(self) -> Callable[[], object]:
        """A prompt, with the logits after its last token."""
        length = self._sizes.prompt
        part = SequenceInput(token_ids=[i % 100 for i in range(length)], start=0, runs=((0, length),))
        tokens, runner = lay_out(self._runner, [part]), self._runner
        return lambda: runner._project(hidden(runner, tokens)[-1:])


class TransformersModel:
    """Steps of transformers, eager, with its default attention and a cache that grows."""

    def __init__(self, sizes: ModelSizes) -> None:
        self._sizes = sizes
        config = AutoConfig.for_model(**sizes.config)
        with torch.device(DEVICE):
            self._model = AutoModelForCausalLM.from_config(config, dtype=DTYPE).eval()

    def decode(self, batch: int) -> Callable[[], object]:
        """A step of decodes."""
        before = self._sizes.context - 1
        cache = DynamicCache(config=self._model.config)
        ids = torch.full((batch, before), 7, device=DEVICE)
        for start in range(0, before, 128):  # in pieces, so that a large batch's activations fit
            self._model(ids[:, start : start + 128], past_key_values=cache, use_cache=True, logits_to_keep=1)

        def step() -> None:
            self._model(ids[:, :1], past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache.crop(-1)

        return step

    def prefill(self) -> Callable[[], object]:
        """A prompt, with the logits after its last token."""
        ids = torch.arange(self._sizes.prompt, device=DEVICE)[None] % 100
        return lambda: self._model(ids, use_cache=True, logits_to_keep=1)
