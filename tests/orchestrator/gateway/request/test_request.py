"""What a request may hold, and what it means where it says nothing."""

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.gateway.request.request import Request, check_request
from orchestrator.model_dir.default_sampling import DefaultSampling
from placement.errors import InvalidRequest
from protos.heterodyne.v1 import inference_pb2 as pb
from tests.support.gateway.stub_gateway import CONTEXT, EOS, VOCAB_SIZE, served_model

MODEL = served_model()
SAMPLER = DefaultSampling(temperature=0.5, top_k=5, top_p=0.75, min_p=0.125, repetition_penalty=1.5)


def check(*, prompt_ids: Sequence[int] = (1, 2, 3), model: Any = MODEL, **fields: Any) -> Request:
    message = pb.GenerateRequest(**fields)
    return check_request(message, model, prompt_ids=prompt_ids, new_seed=lambda: 99, new_id=lambda: "made")


def test_what_is_absent_is_the_models_default() -> None:
    request = check(model=served_model(defaults=SAMPLER))
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, request.seed) == (0.5, 5, 0.75, 99)
    assert (sampling.min_p, sampling.repetition_penalty) == (0.125, 1.5)
    assert (sampling.presence_penalty, sampling.frequency_penalty, list(sampling.biases)) == (0.0, 0.0, [])
    assert list(sampling.bias_ids) == []
    assert (request.num_choices, request.min_tokens, request.max_tokens) == (1, 0, CONTEXT - 3)
    assert (request.cache_salt, request.echo, request.grammar, request.logprobs) == (b"", False, None, None)
    assert (request.request_id, request.stop_token_ids) == ("made", (EOS,))


def test_what_is_said_counts_before_the_default_even_where_it_says_nothing_changes() -> None:
    sampling = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "seed": 0}
    request = check(model=served_model(defaults=SAMPLER), sampling=sampling)
    given = request.sampling
    assert (given.temperature, given.top_k, given.top_p, request.seed) == (0.0, 0, 1.0, 0)
    assert (given.min_p, given.repetition_penalty) == (0.0, 1.0)


def test_everything_that_was_asked_is_kept() -> None:
    request = check(
        sampling={
            "min_p": 0.25,
            "repetition_penalty": 100.0,
            "presence_penalty": -2.0,
            "frequency_penalty": 2.0,
            "logit_bias": [{"token_id": 31, "bias": -100.0}, {"token_id": 0, "bias": 100.0}],
        },
        num_choices=64,
        min_tokens=5,
        max_tokens=5,
        echo=True,
        logprobs=20,
        cache_salt="tenant",
    )
    sampling = request.sampling
    assert (sampling.min_p, sampling.repetition_penalty) == (0.25, 100.0)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (-2.0, 2.0)
    assert (list(sampling.bias_ids), list(sampling.biases)) == ([31, 0], [-100.0, 100.0])
    assert (request.num_choices, request.min_tokens, request.echo, request.logprobs) == (64, 5, True, 20)
    assert request.cache_salt == hashlib.sha256(b"tenant").digest()


def test_with_echo_nothing_need_be_generated() -> None:
    assert check(echo=True, max_tokens=0).max_tokens == 0


NAN = math.nan
BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"sampling": {"min_p": -0.1}}, "sampling.min_p", "out of range"),
    ({"sampling": {"min_p": 1.1}}, "sampling.min_p", "out of range"),
    ({"sampling": {"min_p": NAN}}, "sampling.min_p", "out of range"),
    ({"sampling": {"repetition_penalty": 0.0}}, "sampling.repetition_penalty", "out of range"),
    ({"sampling": {"repetition_penalty": 0.0099}}, "sampling.repetition_penalty", "out of range"),
    ({"sampling": {"repetition_penalty": 100.5}}, "sampling.repetition_penalty", "out of range"),
    ({"sampling": {"repetition_penalty": NAN}}, "sampling.repetition_penalty", "out of range"),
    ({"sampling": {"presence_penalty": 2.1}}, "sampling.presence_penalty", "out of range"),
    ({"sampling": {"presence_penalty": NAN}}, "sampling.presence_penalty", "out of range"),
    ({"sampling": {"frequency_penalty": -2.1}}, "sampling.frequency_penalty", "out of range"),
    ({"sampling": {"frequency_penalty": NAN}}, "sampling.frequency_penalty", "out of range"),
    ({"sampling": {"temperature": math.inf}}, "sampling.temperature", "out of range"),
    ({"sampling": {"top_p": NAN}}, "sampling.top_p", "out of range"),
    ({"sampling": {"logit_bias": [{"token_id": 32}]}}, "sampling.logit_bias[0].token_id", "out of range"),
    ({"sampling": {"logit_bias": [{"bias": 101}]}}, "sampling.logit_bias[0].bias", "out of range"),
    ({"sampling": {"logit_bias": [{"bias": NAN}]}}, "sampling.logit_bias[0].bias", "out of range"),
    ({"sampling": {"logit_bias": [{"token_id": 3}] * 2}}, "sampling.logit_bias[1].token_id", "already"),
    ({"sampling": {"logit_bias": [{"token_id": 3}] * 1025}}, "sampling.logit_bias", "too many"),
    ({"num_choices": 0}, "num_choices", "out of range"),
    ({"num_choices": 65}, "num_choices", "out of range"),
    ({"num_choices": 2**31 - 1}, "num_choices", "out of range"),
    ({"min_tokens": -1}, "min_tokens", "out of range"),
    ({"min_tokens": 6, "max_tokens": 5}, "min_tokens", "out of range"),
    ({"min_tokens": CONTEXT - 2}, "min_tokens", "out of range"),
    ({"max_tokens": 0}, "max_tokens", "out of range"),
    ({"max_tokens": -1, "echo": True}, "max_tokens", "out of range"),
    ({"max_tokens": 0, "echo": True, "min_tokens": 1}, "min_tokens", "out of range"),
    ({"logprobs": 21}, "logprobs", "out of range"),
    ({"cache_salt": "x" * 129}, "cache_salt", "too long"),
    ({"request_id": "x" * 129}, "request_id", "too long"),
    ({"request_id": "a\nlevel=ERROR"}, "request_id", "cannot be printed"),
    ({"request_id": "\x1b[31m"}, "request_id", "cannot be printed"),
    ({"min_tokens": 1, "structured_output": {"regex": "a"}}, "min_tokens", "together with structured_output"),
    ({"max_tokens": 0, "echo": True, "num_choices": 2}, "num_choices", "all alike"),
]


@pytest.mark.parametrize(("fields", "name", "problem"), BAD)
def test_a_bad_field_is_named_with_its_problem_and_its_fix(fields: dict[str, Any], name: str, problem: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check(**fields)
    assert caught.value.field == name
    assert problem in caught.value.problem and caught.value.fix.endswith(".")


@pytest.mark.parametrize("fields", [{"stop": ["secret" * 50]}, {"cache_salt": "secret" * 50}])
def test_what_a_client_wrote_is_not_repeated(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check(**fields)
    assert "secret" not in str(caught.value) and "300 characters" in str(caught.value)


FLOATS = st.floats(width=32)


@settings(deadline=None)
@given(min_p=FLOATS, repetition=FLOATS, presence=FLOATS, frequency=FLOATS, bias=FLOATS, token_id=st.integers(0, 99))
def test_whatever_is_sent_is_in_range_or_refused(
    min_p: float, repetition: float, presence: float, frequency: float, bias: float, token_id: int
) -> None:
    sampling = {
        "min_p": min_p,
        "repetition_penalty": repetition,
        "presence_penalty": presence,
        "frequency_penalty": frequency,
        "logit_bias": [{"token_id": token_id, "bias": bias}],
    }
    fits = (
        0 <= min_p <= 1
        and np.float32(0.01) <= repetition <= 100
        and abs(presence) <= 2
        and abs(frequency) <= 2
        and abs(bias) <= 100
        and token_id < VOCAB_SIZE
    )
    try:
        checked = check(sampling=sampling).sampling
    except InvalidRequest:
        assert not fits
    else:
        assert fits
        assert (checked.min_p, checked.repetition_penalty) == (min_p, repetition)
