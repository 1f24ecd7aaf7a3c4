"""Checks the sampling fields of a GenerateRequest and fills in what is absent. Pure."""

from collections.abc import Sequence

from orchestrator.gateway.model import ServedModel
from orchestrator.model_dir.default_sampling import (
    MAX_REPETITION_PENALTY,
    MAX_TEMPERATURE,
    MAX_TOP_K,
    MIN_REPETITION_PENALTY,
)
from placement.errors import InvalidRequest
from protos.heterodyne.v1 import inference_pb2 as pb
from protos.heterodyne.worker.v1 import worker_pb2

MAX_LOGIT_BIASES = 1024
MAX_LOGIT_BIAS = 100.0
MAX_PENALTY = 2.0


def check_sampling(message: pb.SamplingParams, model: ServedModel) -> worker_pb2.Sampling:
    """Returns ``message`` as a replica is told it, every default filled in.

    Raises:
        InvalidRequest: a value is out of its range or no number.
    """
    _check_biases(message.logit_bias, model.spec.vocab_size)
    filled = model.defaults.message()
    filled.MergeFrom(message)  # what the client has set wins
    sampling = worker_pb2.Sampling(
        temperature=filled.temperature,
        top_k=filled.top_k,
        top_p=filled.top_p,
        min_p=filled.min_p,
        repetition_penalty=filled.repetition_penalty,
        presence_penalty=filled.presence_penalty,
        frequency_penalty=filled.frequency_penalty,
        bias_ids=[item.token_id for item in filled.logit_bias],
        biases=[item.bias for item in filled.logit_bias],
    )
    check_bounds("sampling.temperature", sampling.temperature, 0.0, MAX_TEMPERATURE)
    check_bounds("sampling.top_k", sampling.top_k, 0, MAX_TOP_K)
    if not 0.0 < sampling.top_p <= 1.0:
        raise InvalidRequest(
            field="sampling.top_p",
            value=sampling.top_p,
            problem="is out of range",
            fix="Use a value above 0, at most 1.",
        )
    check_bounds("sampling.min_p", sampling.min_p, 0.0, 1.0)
    check_bounds(
        "sampling.repetition_penalty", sampling.repetition_penalty, MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY
    )
    check_bounds("sampling.presence_penalty", sampling.presence_penalty, -MAX_PENALTY, MAX_PENALTY)
    check_bounds("sampling.frequency_penalty", sampling.frequency_penalty, -MAX_PENALTY, MAX_PENALTY)
    return sampling


def _check_biases(message: Sequence[pb.LogitBias], vocab_size: int) -> None:
    if len(message) > MAX_LOGIT_BIASES:
        raise InvalidRequest(
            field="sampling.logit_bias",
            value=len(message),
            problem="are too many",
            fix=f"Send at most {MAX_LOGIT_BIASES}.",
        )
    seen: set[int] = set()
    for index, item in enumerate(message):
        field = f"sampling.logit_bias[{index}]"
        check_bounds(f"{field}.token_id", item.token_id, 0, vocab_size - 1)
        check_bounds(f"{field}.bias", item.bias, -MAX_LOGIT_BIAS, MAX_LOGIT_BIAS)
        if item.token_id in seen:
            raise InvalidRequest(
                field=f"{field}.token_id",
                value=item.token_id,
                problem="has a bias already",
                fix="Give each token one bias.",
            )
        seen.add(item.token_id)


def check_bounds(field: str, value: float, low: float, high: float) -> None:
    """Raises InvalidRequest unless ``value`` is within [low, high]."""
    # Written so that a NaN is out of range too.
    if not low <= value <= high:
        raise InvalidRequest(
            field=field, value=value, problem="is out of range", fix=f"Use {_figure(low)} to {_figure(high)}."
        )


def _figure(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
