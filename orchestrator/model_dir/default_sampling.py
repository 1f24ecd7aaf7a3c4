"""Reads from a model's generation_config.json what sampling fields mean that a request leaves out."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from placement.errors import InvalidModel
from protos.heterodyne.v1 import inference_pb2 as pb

MAX_TEMPERATURE = 100.0
MAX_TOP_K = 2**31 - 1
# Lower ones blow the logits of what was said up by more than float32 tells apart.
# 0.01 as the float32 that it comes as.
MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY = 0.009999999776482582, 100.0
# What transformers takes where a file that samples leaves the key out.
_TEMPERATURE, _TOP_K, _TOP_P = 1.0, 50, 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DefaultSampling:
    """The values of sampling fields that a request leaves out: those of generation_config.json, else greedy."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def message(self) -> pb.SamplingParams:
        """Returns the message by which clients see the defaults."""
        return pb.SamplingParams(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
        )


def default_sampling(generation_config: Mapping[str, object]) -> DefaultSampling:
    """Returns the defaults that generation_config.json sets; greedy unless it says ``do_sample``.

    A ``null`` turns a filter off; so does ``top_k`` -1. ``temperature`` 0 is greedy. ``repetition_penalty`` holds for
    greedy decoding too.

    Raises:
        InvalidModel: a value that no sampler could use.
    """
    do_sample = generation_config.get("do_sample")
    if not isinstance(do_sample, bool | None):
        raise _refusal("do_sample", do_sample, "is not true or false", "Write true or false.")
    penalty = _number(generation_config, "repetition_penalty", absent=1.0, null=1.0)
    if not MIN_REPETITION_PENALTY <= penalty <= MAX_REPETITION_PENALTY:
        problem = f"is not between {MIN_REPETITION_PENALTY:g} and {MAX_REPETITION_PENALTY:g}"
        raise _refusal("repetition_penalty", penalty, problem, "Use the model's own, or 1 for none.")
    if not do_sample:
        return DefaultSampling(repetition_penalty=penalty)
    temperature = _number(generation_config, "temperature", absent=_TEMPERATURE, null=_TEMPERATURE)
    if not 0.0 <= temperature <= MAX_TEMPERATURE:
        problem = f"is not between 0 and {MAX_TEMPERATURE:g}"
        raise _refusal("temperature", temperature, problem, "Use the model's own, or 0 for greedy.")
    filters = _filters(generation_config)
    if temperature == 0.0:
        return DefaultSampling(repetition_penalty=penalty)
    return replace(filters, temperature=temperature, repetition_penalty=penalty)


def _filters(generation_config: Mapping[str, object]) -> DefaultSampling:
    """Returns the filters of a file that says ``do_sample``."""
    top_k = _number(generation_config, "top_k", absent=_TOP_K, null=0)
    top_p = _number(generation_config, "top_p", absent=_TOP_P, null=1.0)
    min_p = _number(generation_config, "min_p", absent=0.0, null=0.0)
    if top_k != int(top_k) or not -1 <= top_k <= MAX_TOP_K:
        problem = f"is not a whole number from -1 to {MAX_TOP_K}"
        raise _refusal("top_k", top_k, problem, "Use the model's own, or 0 for all tokens.")
    if not 0.0 < top_p <= 1.0:
        raise _refusal("top_p", top_p, "is not above 0 and at most 1", "Use the model's own, or 1 for all tokens.")
    if not 0.0 <= min_p <= 1.0:
        raise _refusal("min_p", min_p, "is not between 0 and 1", "Use the model's own, or 0 for all tokens.")
    return DefaultSampling(top_k=max(0, int(top_k)), top_p=top_p, min_p=min_p)


def _number(values: Mapping[str, object], key: str, *, absent: float, null: float) -> float:
    value = values.get(key, absent)
    if value is None:
        return null
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _refusal(key, value, "is not a number", "Use the generation_config.json that was saved with the model.")
    return value


def _refusal(key: str, value: object, problem: str, fix: str) -> InvalidModel:
    return InvalidModel(field=f"generation_config.json: {key}", value=value, problem=problem, fix=fix)
