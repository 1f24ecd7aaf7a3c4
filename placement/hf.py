"""Reads Hugging Face's ``config.json`` of the Llama family into a :class:`ModelSpec`.

Owns every rule about what a served model may look like. Pure: the caller reads the files.
"""

import math
from collections.abc import Mapping

from placement.errors import InvalidModel
from placement.specs import DType, ModelSpec, RopeSpec

MAX_LAYERS = 1024
MAX_HEADS = 4096
MAX_HEAD_DIM = 1024
MAX_WIDTH = 1 << 20
MAX_VOCAB = 1 << 22
MAX_CONTEXT = 1 << 27

_REQUIRED = object()
_FIX_EXPORT = "Use the config.json that was saved with the model."


def read_model_spec(config: Mapping[str, object], generation_config: Mapping[str, object] | None = None) -> ModelSpec:
    """The model that a ``config.json`` (and ``generation_config.json``, where there is one) describes.

    Understands the layouts of transformers 4 (``rope_theta``, ``rope_scaling``) and 5 (``rope_parameters``).
    The number type is not part of it: see :func:`saved_dtype`.

    Raises:
        InvalidModel: a value is missing, of the wrong type, impossible, or of a model that is not served.
    """
    _check_architecture(config)
    num_heads = _int(config, "num_attention_heads", maximum=MAX_HEADS)
    num_kv_heads = _int(config, "num_key_value_heads", default=num_heads, maximum=MAX_HEADS)
    if num_heads % num_kv_heads:
        raise _refusal("num_key_value_heads", num_kv_heads, f"does not divide num_attention_heads = {num_heads}")
    hidden_size = _int(config, "hidden_size", maximum=MAX_WIDTH)
    vocab_size = _int(config, "vocab_size", maximum=MAX_VOCAB)
    return ModelSpec(
        architecture="llama",
        num_layers=_int(config, "num_hidden_layers", maximum=MAX_LAYERS),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=_head_dim(config, hidden_size=hidden_size, num_heads=num_heads),
        ffn_size=_int(config, "intermediate_size", maximum=MAX_WIDTH),
        vocab_size=vocab_size,
        max_context_tokens=_int(config, "max_position_embeddings", maximum=MAX_CONTEXT),
        rms_norm_eps=_positive(config, "rms_norm_eps", maximum=1.0),
        rope=_rope(config),
        tied_embeddings=_bool(config, "tie_word_embeddings"),
        attention_bias=_bool(config, "attention_bias"),
        mlp_bias=_bool(config, "mlp_bias"),
        eos_token_ids=_eos_token_ids(config, generation_config, vocab_size),
    )


def saved_dtype(config: Mapping[str, object]) -> DType:
    """The number type that the model was saved in, for a deployment that names none; float32 where it is not said.

    Reads ``dtype`` (transformers 5) or ``torch_dtype`` (4).

    Raises:
        InvalidModel: it is not one that is served.
    """
    key = "dtype" if config.get("dtype") is not None else "torch_dtype"
    name = config.get(key)
    if name is None:
        return DType.FLOAT32
    if name in ("float32", "bfloat16"):
        return DType(name)
    fix = "Set model.dtype to bfloat16 or float32 in the cluster file: weights are converted while they load."
    raise _refusal(key, name, "is not a number type that is served", fix)


def _check_architecture(config: Mapping[str, object]) -> None:
    fix_llama = "Models of the Llama family (LlamaForCausalLM) are served."
    model_type = config.get("model_type")
    if model_type != "llama":
        raise _refusal("model_type", model_type, "is not an architecture that is served", fix_llama)
    architectures = config.get("architectures")
    if architectures is not None and architectures != ["LlamaForCausalLM"]:
        raise _refusal("architectures", architectures, "is not an architecture that is served", fix_llama)
    if config.get("hidden_act", "silu") != "silu":
        raise _refusal("hidden_act", config["hidden_act"], "is not silu", fix_llama)
    if config.get("quantization_config") is not None:
        problem = "describes quantized weights, which are not served"
        fix = "Use the model's float32 or bfloat16 weights."
        raise _refusal("quantization_config", config["quantization_config"], problem, fix)


def _head_dim(config: Mapping[str, object], *, hidden_size: int, num_heads: int) -> int:
    if config.get("head_dim") is None and hidden_size % num_heads:
        raise _refusal(
            "hidden_size", hidden_size, f"is not a multiple of num_attention_heads = {num_heads}",
            "Give head_dim, or sizes that divide.",
        )  # fmt: skip
    head_dim = _int(config, "head_dim", default=hidden_size // num_heads, maximum=MAX_HEAD_DIM)
    if head_dim % 2:
        raise _refusal("head_dim", head_dim, "is odd, and rotary embeddings turn pairs")
    return head_dim


def _rope(config: Mapping[str, object]) -> RopeSpec:
    """Rotary embedding from ``rope_parameters`` (transformers 5) or ``rope_theta`` with ``rope_scaling``."""
    where = "rope_parameters" if config.get("rope_parameters") is not None else "rope_scaling"
    given = config.get(where)
    parameters = {} if given is None else given
    if not isinstance(parameters, Mapping):
        raise _refusal(where, given, "is not an object")
    theta = _positive(config, "rope_theta", default=10_000.0)
    theta = _positive(parameters, "rope_theta", default=theta, where=where)
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        name = f"{where}.partial_rotary_factor"
        raise _refusal(name, parameters["partial_rotary_factor"], "is not served: the whole head is turned")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return RopeSpec(theta=theta)
    if kind != "llama3":
        fix = "The rope types default and llama3 are served."
        raise _refusal(f"{where}.rope_type", kind, "is not a rope type that is served", fix)
    low = _positive(parameters, "low_freq_factor", where=where)
    high = _positive(parameters, "high_freq_factor", where=where)
    if low >= high:
        raise _refusal(f"{where}.low_freq_factor", low, f"is not below high_freq_factor = {high}")
    original = _int(parameters, "original_max_position_embeddings", maximum=MAX_CONTEXT, where=where)
    return RopeSpec(
        theta=theta,
        kind="llama3",
        factor=_positive(parameters, "factor", where=where),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_tokens=original,
    )


def _eos_token_ids(
    config: Mapping[str, object], generation_config: Mapping[str, object] | None, vocab_size: int
) -> tuple[int, ...]:
    """Ids that end a sequence. ``generation_config.json`` wins: chat models list more there."""
    generation = generation_config or {}
    from_generation = generation.get("eos_token_id") is not None
    file = "generation_config.json" if from_generation else "config.json"
    given = (generation if from_generation else config).get("eos_token_id")
    if given is None:
        return ()
    ids: list[object] = list(given) if isinstance(given, list | tuple) else [given]
    checked: list[int] = []
    for token_id in ids:
        if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < vocab_size:
            problem = f"is not a token id below vocab_size = {vocab_size}, nor a list of such ids"
            raise _refusal("eos_token_id", given, problem, file=file)
        checked.append(token_id)
    return tuple(dict.fromkeys(checked))


def _int(values: Mapping[str, object], key: str, *, maximum: int, default: int | None = None, where: str = "") -> int:
    value = _get(values, key, _REQUIRED if default is None else default, where)
    if isinstance(value, bool) or not isinstance(value, int):
        raise _refusal(_dotted(where, key), value, "is not a whole number")
    if not 1 <= value <= maximum:
        raise _refusal(_dotted(where, key), value, f"is not between 1 and {maximum}")
    return value


def _positive(
    values: Mapping[str, object],
    key: str,
    *,
    maximum: float = 1e12,
    default: float | None = None,
    where: str = "",
) -> float:
    value = _get(values, key, _REQUIRED if default is None else default, where)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _refusal(_dotted(where, key), value, "is not a number")
    if not (math.isfinite(value) and 0 < value <= maximum):
        raise _refusal(_dotted(where, key), value, f"is not above 0 and at most {maximum:g}")
    return float(value)


def _bool(values: Mapping[str, object], key: str) -> bool:
    value = _get(values, key, False, "")
    if not isinstance(value, bool):
        raise _refusal(key, value, "is not true or false")
    return value


def _get(values: Mapping[str, object], key: str, default: object, where: str) -> object:
    """The value of ``key``; ``null`` counts as absent, as transformers writes it."""
    value = values.get(key)
    if value is not None:
        return value
    if default is _REQUIRED:
        raise _refusal(_dotted(where, key), None, "is missing")
    return default


def _dotted(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _refusal(key: str, value: object, problem: str, fix: str = _FIX_EXPORT, file: str = "config.json") -> InvalidModel:
    return InvalidModel(field=f"{file}: {key}", value=value, problem=problem, fix=fix)
