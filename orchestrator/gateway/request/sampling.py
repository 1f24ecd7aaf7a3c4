"""Checks the sampling fields of a GenerateRequest and fills in what is absent. Pure."""

from collections.abc import Callable, Sequence

from orchestrator.gateway.fleet.journal import Sampling
from orchestrator.gateway.model import ServedModel
from orchestrator.model_dir.default_sampling import (
    MAX_REPETITION_PENALTY,
    MAX_TEMPERATURE,
    MAX_TOP_K,
    MIN_REPETITION_PENALTY,
)
from placement.errors import InvalidRequest
from protos.heterodyne.v1 import inference_pb2 as pb

MAX_LOGIT_BIASES = 1024
MAX_LOGIT_BIAS = 100.0
MAX_PENALTY = 2.0


def check_sampling(message: pb.SamplingParams, model: ServedModel, new_seed: Callable[[], int]) -> Sampling:
    """The sampling behind ``message``.

    Args:
        new_seed: draws the seed of a request that names none.

    Raises:
        InvalidRequest: a value is out of its range or no number.
    """
    defaults = model.defaults
    penalty = message.repetition_penalty if message.HasField("repetition_penalty") else defaults.repetition_penalty
    sampling = Sampling(
        temperature=message.temperature if message.HasField("temperature") else defaults.temperature,
        top_k=message.top_k if message.HasField("top_k") else defaults.top_k,
        top_p=message.top_p if message.HasField("top_p") else defaults.top_p,
        seed=message.seed if message.HasField("seed") else new_seed(),
        min_p=message.min_p if message.HasField("min_p") else defaults.min_p,
        repetition_penalty=penalty,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        logit_bias=_logit_bias(message.logit_bias, model.spec.vocab_size),
    )
    bounds("sampling.temperature", sampling.temperature, 0.0, MAX_TEMPERATURE)
    bounds("sampling.top_k", sampling.top_k, 0, MAX_TOP_K)
    if not 0.0 < sampling.top_p <= 1.0:
        raise InvalidRequest(
            field="sampling.top_p",
            value=sampling.top_p,
            problem="is out of range",
            fix="Use a value above 0, at most 1.",
        )
    bounds("sampling.min_p", sampling.min_p, 0.0, 1.0)
    bounds("sampling.repetition_penalty", penalty, MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY)
    bounds("sampling.presence_penalty", sampling.presence_penalty, -MAX_PENALTY, MAX_PENALTY)
    bounds("sampling.frequency_penalty", sampling.frequency_penalty, -MAX_PENALTY, MAX_PENALTY)
    return sampling


def _logit_bias(message: Sequence[pb.LogitBias], vocab_size: int) -> tuple[tuple[int, float], ...]:
    """(token id, bias) pairs, in the order of the message."""
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
        bounds(f"{field}.token_id", item.token_id, 0, vocab_size - 1)
        bounds(f"{field}.bias", item.bias, -MAX_LOGIT_BIAS, MAX_LOGIT_BIAS)
        if item.token_id in seen:
            raise InvalidRequest(
                field=f"{field}.token_id",
                value=item.token_id,
                problem="has a bias already",
                fix="Give each token one bias.",
            )
        seen.add(item.token_id)
    return tuple((item.token_id, item.bias) for item in message)


def bounds(field: str, value: float, low: float, high: float) -> None:
    """Raises InvalidRequest unless ``value`` is within [low, high]."""
    # Written so that a NaN is out of range too.
    if not low <= value <= high:
        raise InvalidRequest(
            field=field, value=value, problem="is out of range", fix=f"Use {_figure(low)} to {_figure(high)}."
        )


def _figure(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
