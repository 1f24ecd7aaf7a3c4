"""Fixtures shared by the whole suite: small random checkpoints of every family, written by transformers."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

# Small tensors gain nothing from threads, and spinning ones slow a busy machine down.
os.environ.setdefault("OMP_NUM_THREADS", "1")

EVERY_TARGET = "every_target"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Where only the tests of every target are wanted, leaves out files without any: importing all takes long."""
    wanted = config.getoption("markexpr").startswith(EVERY_TARGET)
    if wanted and collection_path.suffix == ".py" and EVERY_TARGET not in collection_path.read_text(encoding="utf-8"):
        return True
    return None


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``make(family, seed=0, dtype="float32", max_shard_size="5GB", **config)``: the directory of a new checkpoint.

    ``family`` is a ``model_type`` of transformers, ``config`` overrides the keys of its configuration. Weights are
    drawn wide enough that greedy tokens differ clearly in likelihood and no two positions look alike.
    """

    def make(
        family: str, *, seed: int = 0, dtype: str = "float32", max_shard_size: str = "5GB", **overrides: Any
    ) -> Path:
        # Here, so that tests which need neither do not wait for them.
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        config = {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 509,
            "max_position_embeddings": 512,
            "initializer_range": 0.15,
            "eos_token_id": 2,
        }
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **config | overrides))
        for name, parameter in model.named_parameters():
            if name.endswith((".bias", "norm.weight")):  # transformers starts all alike, which hides mistakes
                torch.nn.init.normal_(parameter, mean=parameter.detach().mean().item(), std=0.2)
        directory = tmp_path_factory.mktemp(family)
        model.to(getattr(torch, dtype)).save_pretrained(directory, max_shard_size=max_shard_size)
        return directory

    return make


@pytest.fixture(scope="session")
def llama_checkpoint(checkpoint: Callable[..., Path]) -> Callable[..., Path]:
    """``make(**config)``: as ``checkpoint`` of the Llama family."""
    return partial(checkpoint, "llama")


@pytest.fixture(scope="session")
def served_checkpoint(llama_checkpoint: Callable[..., Path]) -> Path:
    """A random checkpoint of 2 layers with a tokenizer beside it: text in, (random) text out."""
    from tests.support.tokenizer import save_tokenizer

    directory = llama_checkpoint(seed=11, initializer_range=0.3)
    save_tokenizer(directory)
    return directory
