"""Loads models whose linear layers are held in fewer bits, and computes what transformers makes of their weights."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from kernels.select import kernels_for
from placement.model.hf import read_model_spec
from placement.model.quantization import LinearFormat
from placement.model.weights import whole_model
from protos.heterodyne.worker.v1 import worker_pb2 as pb
from tests.support.steps import logits
from workers.host.device import open_device
from workers.model.kv_cache import allocate_kv_cache
from workers.startup.checkpoint import load_weights
from workers.step.runner import ModelRunner
from workers.step.types import SequenceInput

SIZES = {"hidden_size": 96, "intermediate_size": 192, "num_attention_heads": 6, "num_key_value_heads": 2}
PROMPT = [7 * i % 509 for i in range(80)]
CPU = torch.device("cpu")


def config_of(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((path / "config.json").read_text())
    return content


def load(
    path: Path, linear: LinearFormat | None, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, Tensor], list[tuple[int, int]]]:
    reported: list[tuple[int, int]] = []
    slices = whole_model(read_model_spec(config_of(path)))
    return load_weights(path, slices, dtype, CPU, lambda *counts: reported.append(counts), linear), reported


def runner(path: Path, linear: LinearFormat | None, dtype: torch.dtype = torch.float32) -> ModelRunner:
    device, model = open_device("cpu", 1), read_model_spec(config_of(path))
    return ModelRunner(
        model=model,
        weights=load(path, linear, dtype)[0],
        cache=allocate_kv_cache(model, num_slots=256, dtype=dtype, device=device),
        device=CPU,
        kernels=kernels_for("cpu"),
    )


def logits_of(path: Path, linear: LinearFormat | None, dtype: torch.dtype = torch.float32) -> Tensor:
    return logits(runner(path, linear, dtype), [SequenceInput(token_ids=PROMPT, start=0, runs=((3, 83),))])


@torch.inference_mode()
def oracle_logits(path: Path, written_out: dict[str, Tensor]) -> Tensor:
    """Computes logits [T, V] by transformers with some weights replaced. A tied head leaves the embedding alone."""
    oracle = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    for name, weight in written_out.items():
        module = oracle.get_submodule(name.removesuffix(".weight"))
        assert module.weight.shape == weight.shape, name
        module.weight = torch.nn.Parameter(weight)
    result: Tensor = oracle(torch.tensor([PROMPT])).logits[0]
    return result


def load_request(path: Path, **more: Any) -> pb.LoadRequest:
    shard = pb.Shard(layers={"stop": 2}, kv_heads={"stop": 2}, ffn_columns={"stop": 192}, vocab_rows={"stop": 509})
    sizes = {"block_size": 8, "num_blocks": 64, "token_budget": 32, "max_num_seqs": 8, "max_context_tokens": 256}
    return pb.LoadRequest(model_path=str(path), dtype=pb.DTYPE_BFLOAT16, shard=shard, **sizes | more)
