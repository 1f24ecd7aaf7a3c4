"""Prompts, what transformers answers to them, and how answers are compared with that."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from protos.heterodyne.worker.v1 import worker_pb2 as pb
from tests.support.deploying.replicas import tokens

NUM_TOKENS = 12
SHORT, LONG = 21, 150


def prompt(count: int, first: int = 3) -> list[int]:
    """Token ids that differ from those of another ``first``."""
    return [(first + 7 * index + index * index) % 480 + 3 for index in range(count)]


def expected(path: Path, token_ids: list[int], count: int = NUM_TOKENS) -> tuple[list[int], list[float]]:
    """What transformers answers greedily, and the log-probability of each token."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    text, scores = list(token_ids), []
    with torch.inference_mode():
        for _ in range(count):
            log_probs = model(torch.tensor([text])).logits[0, -1].log_softmax(-1)
            text.append(int(log_probs.argmax()))
            scores.append(float(log_probs[text[-1]]))
    return text[len(token_ids) :], scores


def check_equal(outputs: list[pb.SequenceOutput], answer: tuple[list[int], list[float]]) -> None:
    """The greedy tokens are the same, and their log-probabilities within 1e-4."""
    assert tokens(outputs) == answer[0]
    found = [output.logprob for output in outputs if output.HasField("index")]
    assert found == pytest.approx(answer[1], abs=1e-4)
