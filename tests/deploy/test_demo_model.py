"""The demo model in deploy/demo: its shape, its size, its greedy text, its held-out perplexity."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.oracle import greedy_each

DEMO = Path(__file__).resolve().parents[2] / "deploy" / "demo"
END_OF_TEXT = "<|end_of_text|>"
PROMPTS = (
    "And it came to pass in those days,",
    "The wise man said",
    "Genesis\n\nIn the beginning",
    "In the beginning was the Word,",
    "Now Jonah",
)
NEW_TOKENS = 256
RECORDED_PERPLEXITY = 1020.5  # deploy/demo/README.md says why it is that high


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO)


def distinct_share(tokens: list[int], size: int = 4) -> float:
    """The share of a text's runs of `size` tokens that occur for the first time; a loop tends to 0."""
    runs = [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]
    return len(set(runs)) / len(runs)


def test_distinct_share_tells_a_loop_from_a_text() -> None:
    assert distinct_share(list(range(128))) == 1.0
    assert distinct_share([*range(20)] * 6) < 0.2


def test_config_is_a_llama_of_at_least_the_promised_size() -> None:
    config = json.loads((DEMO / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["num_hidden_layers"] >= 6
    assert config["num_attention_heads"] >= 8
    assert config["num_key_value_heads"] >= 4
    assert config["num_attention_heads"] % config["num_key_value_heads"] == 0
    assert config["max_position_embeddings"] == 2048


def test_weights_are_one_file_of_at_most_16_megabytes() -> None:
    files = list(DEMO.glob("*.safetensors*"))
    assert [file.name for file in files] == ["model.safetensors"]
    assert files[0].stat().st_size <= 16_000_000


def test_tokenizer_begins_every_text_and_gives_it_back(model: Any, tokenizer: Any) -> None:
    text = "Genesis\n\nIn the beginning – naïve 日本, 1611."
    tokens = tokenizer(text)["input_ids"]
    assert tokens[0] == model.config.bos_token_id == tokenizer.bos_token_id
    assert tokenizer.convert_tokens_to_ids(END_OF_TEXT) == tokenizer.eos_token_id
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id]
    assert tokenizer.decode(tokens[1:]) == text
    assert len(tokenizer) == model.config.vocab_size


@pytest.fixture(scope="module")
def continuations(model: Any, tokenizer: Any) -> dict[str, list[int]]:
    return dict(zip(PROMPTS, greedy_each(model, [tokenizer(p)["input_ids"] for p in PROMPTS], NEW_TOKENS), strict=True))


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_continuations_are_long_and_not_degenerate(
    continuations: dict[str, list[int]], tokenizer: Any, prompt: str
) -> None:
    output = continuations[prompt]
    assert len(output) == NEW_TOKENS
    assert tokenizer.eos_token_id not in output
    assert distinct_share(output) > 0.6, tokenizer.decode(output)


def test_perplexity_on_held_out_chapters_is_the_recorded_one(model: Any, tokenizer: Any) -> None:
    chapters = [part for part in (DEMO / "heldout.txt").read_text().split(f"\n{END_OF_TEXT}\n") if part]
    assert len(chapters) >= 5
    total, count = 0.0, 0
    for chapter in chapters:
        tokens = torch.tensor([*tokenizer(chapter, verbose=False)["input_ids"], tokenizer.eos_token_id])
        for start in range(0, len(tokens) - 1, 1024):
            piece = tokens[start : start + 1025]
            with torch.inference_mode():
                logits = model(input_ids=piece[None, :-1], use_cache=False).logits[0]
            total += functional.cross_entropy(logits, piece[1:], reduction="sum").item()
            count += len(piece) - 1
    assert math.exp(total / count) == pytest.approx(RECORDED_PERPLEXITY, rel=0.005)
