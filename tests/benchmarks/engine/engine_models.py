"""Random checkpoints for benchmarks, written once: config, tokenizer and bfloat16 weights, made without a network."""

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from placement.model.hf import read_model_spec
from placement.model.specs import ModelSpec
from placement.model.weights import TensorSlice, whole_model
from tests.benchmarks.report import RESULTS

DIRECTORY = RESULTS / "models"
_COMMON: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "vocab_size": 32000,
}
# The 1.1 B shape is TinyLlama's (Zhang et al. 2024), with a context that also holds 2048 tokens and an answer.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-1.1b": {
        "hidden_size": 2048,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "intermediate_size": 5632,
        "max_position_embeddings": 4096,
    },
    # That of SmolLM-135M (Allal et al. 2024), with a context that also holds 2048 tokens and an answer.
    "smollm-135m": {
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "max_position_embeddings": 4096,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 256,
        "max_position_embeddings": 4096,
    },
    # Few layers of that shape, with 1, 4 and 8 query heads to a KV head: for what depends on that alone.
    **{
        f"llama-g{num_queries}": {
            "hidden_size": 2048,
            "num_hidden_layers": 4,
            "num_attention_heads": 32,
            "num_key_value_heads": 32 // num_queries,
            "intermediate_size": 5632,
            "max_position_embeddings": 4096,
            "vocab_size": 4096,
        }
        for num_queries in (1, 4, 8)
    },
    "null": {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "intermediate_size": 8,
        "max_position_embeddings": 131072,
    },
}
_SPECIAL = ("<unk>", "<s>", "</s>")


def checkpoint(shape: str, *, directory: Path = DIRECTORY) -> Path:
    """The directory of the checkpoint of that shape; written if it is not there."""
    path = directory / shape
    if path.is_dir():
        return path
    partial = directory / f"{shape}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    config = _COMMON | SHAPES[shape]
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    make_tokenizer(config["vocab_size"]).save(str(partial / "tokenizer.json"))
    write_weights(partial / "model.safetensors", whole_model(read_model_spec(config)))
    partial.rename(path)
    return path


def read_spec(path: Path) -> ModelSpec:
    """What ``path``'s config.json says."""
    return read_model_spec(json.loads((path / "config.json").read_text()))


def make_tokenizer(vocab_size: int) -> Tokenizer:
    """Byte-level BPE: the bytes, then pairs of ASCII characters, then triples, until there are ``vocab_size``."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*_SPECIAL, *alphabet]
    merges: list[tuple[str, str]] = []
    letters = [character for character in alphabet if character.isascii()]
    parts = list(letters)
    while len(tokens) < vocab_size:
        longer = []
        for merge in ((part, letter) for part in parts for letter in letters):
            if len(tokens) == vocab_size:
                break
            merges.append(merge)
            longer.append("".join(merge))
            tokens.append(longer[-1])
        parts = longer
    model = models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges)
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens(list(_SPECIAL))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def write_weights(file: Path, tensors: tuple[TensorSlice, ...]) -> None:
    """A safetensors file of random bfloat16 weights, one tensor in memory at a time. Norms are 1."""
    generator = torch.Generator().manual_seed(0)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + 2 * tensor.num_elements
        header[tensor.name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # the numbers begin at a multiple of 8
    with file.open("wb") as output:
        output.write(struct.pack("<Q", len(encoded)) + encoded)
        for tensor in tensors:
            if len(tensor.shape) == 1:
                values = torch.ones(tensor.shape)
            else:
                values = torch.empty(tensor.shape).normal_(std=0.02, generator=generator)
            output.write(values.to(torch.bfloat16).view(torch.uint8).numpy().data)
