"""Reads rotary embeddings from ``config.json``.

Owns both layouts: ``rope_parameters`` of transformers 5, and ``rope_theta`` beside ``rope_scaling`` of 4.
"""

import math

from placement.model.hf_values import MAX_CONTEXT, Config, flag, positive, refusal, section, whole_number
from placement.model.specs import RopeSpec

_THETA = 10_000.0
_GLOBAL_THETA = 1_000_000.0  # Gemma 3's, where its file says nothing
_FIX_KIND = "The rope types default, linear, llama3 and yarn are served."
_VARYING = ("dynamic", "longrope", "su")


Ropes = tuple[RopeSpec, RopeSpec | None]


def read_ropes(config: Config) -> Ropes:
    """Reads the rotary embedding of all layers; the second of the pair is None.

    Where a file has both layouts, ``rope_scaling`` counts, as in transformers.

    Raises:
        InvalidModel: a value is missing or impossible, or the kind is not served.
    """
    where = "rope_scaling" if config.get("rope_scaling") or config.get("rope_parameters") is None else "rope_parameters"
    theta = positive(config, "rope_theta", default=_THETA)
    return _read(config, section(config, where), where, theta), None


def read_layered_ropes(config: Config) -> Ropes:
    """Reads the rotary embeddings of Gemma 3: of layers that attend to all tokens, and of those with a window.

    ``rope_parameters`` holds an object for each; in the older layout ``rope_scaling`` is for the former alone.

    Raises:
        InvalidModel: as :func:`read_ropes` says.
    """
    theta = positive(config, "rope_theta", default=_GLOBAL_THETA)
    local_theta = positive(config, "rope_local_base_freq", default=_THETA)
    parameters = section(config, "rope_parameters")
    whole, local = (section(parameters, key, "rope_parameters") for key in ("full_attention", "sliding_attention"))
    where = "rope_parameters.full_attention"
    if config.get("rope_scaling"):
        whole, where = section(config, "rope_scaling"), "rope_scaling"
    return (
        _read(config, whole, where, theta),
        _read(config, local, "rope_parameters.sliding_attention", local_theta),
    )


def context_tokens(rope: RopeSpec, max_context_tokens: int) -> int:
    """Returns the longest context. Files of YaRN models often give the length before it was stretched."""
    if rope.kind != "yarn":
        return max_context_tokens
    return min(MAX_CONTEXT, max(max_context_tokens, int(rope.original_max_tokens * rope.factor)))


def _read(config: Config, parameters: Config, where: str, theta: float) -> RopeSpec:
    """Reads a rotary embedding from the object at ``where``; ``theta`` holds where the object gives none."""
    theta = positive(parameters, "rope_theta", default=theta, where=where)
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        name = f"{where}.partial_rotary_factor"
        raise refusal(name, parameters["partial_rotary_factor"], "is not served: the whole head is turned")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    match kind:
        case "default":
            return RopeSpec(theta=theta)
        case "linear":
            return RopeSpec(theta=theta, kind="linear", factor=positive(parameters, "factor", where=where))
        case "llama3":
            return _llama3(config, parameters, where, theta)
        case "yarn":
            return _yarn(config, parameters, where, theta)
    problem = "is not a rope type that is served"
    if kind in _VARYING:
        problem = "is not served: its frequencies change with the length of the sequence"
    raise refusal(f"{where}.rope_type", kind, problem, _FIX_KIND)


def _llama3(config: Config, parameters: Config, where: str, theta: float) -> RopeSpec:
    low = positive(parameters, "low_freq_factor", where=where)
    high = positive(parameters, "high_freq_factor", where=where)
    if low >= high:
        raise refusal(f"{where}.low_freq_factor", low, f"is not below high_freq_factor = {high}")
    return RopeSpec(
        theta=theta,
        kind="llama3",
        factor=positive(parameters, "factor", where=where),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_tokens=_original_max_tokens(config, parameters, where),
    )


def _yarn(config: Config, parameters: Config, where: str, theta: float) -> RopeSpec:
    if theta <= 1.0:
        raise refusal("rope_theta", theta, "is not above 1, as yarn needs")
    original = _original_max_tokens(config, parameters, where)
    context = whole_number(config, "max_position_embeddings", maximum=MAX_CONTEXT)
    factor = positive(parameters, "factor", default=context / original, where=where)
    fast = positive(parameters, "beta_fast", default=32.0, where=where)
    slow = positive(parameters, "beta_slow", default=1.0, where=where)
    if fast < slow:
        raise refusal(f"{where}.beta_fast", fast, f"is below beta_slow = {slow}")
    attention_factor = _yarn_attention_factor(parameters, where, factor)
    return RopeSpec(
        theta=theta,
        kind="yarn",
        factor=factor,
        beta_fast=fast,
        beta_slow=slow,
        original_max_tokens=original,
        truncate=flag(parameters, "truncate", default=True, where=where),
        attention_factor=positive(parameters, "attention_factor", default=attention_factor, where=where),
    )


def _yarn_attention_factor(parameters: Config, where: str, factor: float) -> float:
    """Computes ``0.1 ln(factor) + 1`` (Peng et al. 2023), or DeepSeek's ratio of two such terms."""

    def term(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1.0 else 1.0

    if not (parameters.get("mscale") and parameters.get("mscale_all_dim")):
        return term(1.0)
    mscale, mscale_all_dim = (positive(parameters, key, where=where) for key in ("mscale", "mscale_all_dim"))
    return term(mscale) / term(mscale_all_dim)


def _original_max_tokens(config: Config, parameters: Config, where: str) -> int:
    """Reads the original context length, which stands beside the object, or in it.

    Where neither says it, the context was not stretched beyond ``max_position_embeddings``.
    """
    key = "original_max_position_embeddings"
    if config.get(key) is not None:
        return whole_number(config, key, maximum=MAX_CONTEXT)
    context = whole_number(config, "max_position_embeddings", maximum=MAX_CONTEXT)
    return whole_number(parameters, key, default=context, maximum=MAX_CONTEXT, where=where)
