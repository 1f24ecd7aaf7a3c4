"""Reads what the ``config.json`` of each served model family says beyond, or other than, Llama's.

Owns the mapping from a family's name to what its layers do. Follows transformers, whose classes are named.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from placement.model.hf_rope import Ropes, read_layered_ropes, read_ropes
from placement.model.hf_values import MAX_CONTEXT, Config, flag, positive, refusal, whole_number
from placement.model.specs import Activation, Architecture, ModelSpec

_UNSERVED = {
    "gemma2": "is not served: Gemma 2 caps attention scores and logits (softcapping)",
    "gemma3": "is not served: it reads images too",
}
_FIX_GEMMA3 = "Save its text part as a model of its own (gemma3_text)."
_ACTIVATIONS: Mapping[str, Activation] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_LOCAL, _GLOBAL = "sliding_attention", "full_attention"
_MAX_SCALAR = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """The rules for reading a family's configuration.

    Attributes:
        model_class: the class of transformers that holds its language model, as ``architectures`` names it.
        complete: the function that adds the family's own values to those that all families have alike.
        defaults: the values of keys that its files may leave out. A key whose value is ``null`` is not left out.
        activation_key: the key of the feed-forward's activation.
        activations: the activation that each value of this key means.
        ropes: the function that reads the rotary embeddings of layers that attend to all tokens and of those with a
            window.
    """

    model_class: str
    complete: Callable[[ModelSpec, Config], ModelSpec]
    defaults: Mapping[str, object] = field(default_factory=dict)
    activation_key: str = "hidden_act"
    activations: Mapping[str, Activation] = field(default_factory=lambda: _ACTIVATIONS)
    ropes: Callable[[Config], Ropes] = read_ropes

    def activation(self, config: Config) -> Activation:
        """Reads the activation of the gate. Raises InvalidModel for one that is not served."""
        value = config.get(self.activation_key, "silu")
        if not isinstance(value, str) or value not in self.activations:
            fix = f"Models with one of these are served: {', '.join(_ACTIVATIONS)}."
            raise refusal(self.activation_key, value, "is not an activation that is served", fix)
        return self.activations[value]


def family_of(config: Config) -> tuple[Architecture, Family]:
    """Finds the family of a ``config.json``, and its name.

    Raises:
        InvalidModel: the family is not served.
    """
    model_type = config.get("model_type")
    for name, family in FAMILIES.items():
        if name == model_type:
            _check_class(config, family)
            return name, family
    problem = _UNSERVED.get(str(model_type), "is not an architecture that is served")
    fix = _FIX_GEMMA3 if model_type == "gemma3" else f"Models of these types are served: {', '.join(FAMILIES)}."
    raise refusal("model_type", model_type, problem, fix)


def _check_class(config: Config, family: Family) -> None:
    architectures = config.get("architectures")
    if architectures is not None and architectures != [family.model_class]:
        fix = f"Of this model_type, {family.model_class} is served."
        raise refusal("architectures", architectures, "is not an architecture that is served", fix)


def _llama(model: ModelSpec, config: Config) -> ModelSpec:
    bias = flag(config, "attention_bias")
    return replace(model, qkv_bias=bias, output_bias=bias, mlp_bias=flag(config, "mlp_bias"))


def _mistral(model: ModelSpec, config: Config) -> ModelSpec:
    if config.get("layer_types") is not None:
        problem = "is not read for mistral models, whose layers are all alike"
        raise refusal("layer_types", config["layer_types"], problem)
    has_window = config.get("sliding_window") is not None
    return replace(model, windows=_reached(model, _windows(config, [has_window] * model.num_layers)))


def _qwen2(model: ModelSpec, config: Config) -> ModelSpec:
    return replace(model, qkv_bias=True, windows=_upper_windows(model, config))


def _qwen3(model: ModelSpec, config: Config) -> ModelSpec:
    bias = flag(config, "attention_bias")
    return replace(model, qkv_bias=bias, output_bias=bias, qk_norm=True, windows=_upper_windows(model, config))


def _gemma(model: ModelSpec, config: Config) -> ModelSpec:
    if flag(config, "use_bidirectional_attention"):
        problem = "is not served: a token attends to those before it only"
        raise refusal("use_bidirectional_attention", True, problem, "Use a model that generates text.")
    bias = flag(config, "attention_bias")
    return replace(
        model,
        qkv_bias=bias,
        output_bias=bias,
        unit_offset_norms=True,
        embedding_scale=model.hidden_size**0.5,
    )


def _gemma3(model: ModelSpec, config: Config) -> ModelSpec:
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config.get(key) is not None:
            raise refusal(key, config[key], "is not served")
    has_window = _layer_types(model, config)
    if has_window is None:
        period = whole_number(config, "sliding_window_pattern", maximum=MAX_CONTEXT)
        has_window = [layer % period != 0 for layer in range(1, model.num_layers + 1)]
    return replace(
        _gemma(model, config),
        windows=_windows(config, has_window),
        attention_scale=positive(config, "query_pre_attn_scalar", maximum=_MAX_SCALAR) ** -0.5,
        qk_norm=True,
        post_norms=True,
    )


def _upper_windows(model: ModelSpec, config: Config) -> tuple[int | None, ...]:
    """Reads the windows of Qwen: those of ``layer_types``, or else of the layers from ``max_window_layers`` on."""
    has_window = _layer_types(model, config)
    if not flag(config, "use_sliding_window"):
        if has_window is not None and any(has_window):
            raise refusal("layer_types", config["layer_types"], "has windows, and use_sliding_window is false")
        return ()
    if has_window is None:
        first = config["max_window_layers"]
        if isinstance(first, bool) or not isinstance(first, int):
            raise refusal("max_window_layers", first, "is not a whole number")
        is_off = config.get("sliding_window") is None
        has_window = [layer >= first and not is_off for layer in range(model.num_layers)]
    return _reached(model, _windows(config, has_window))


def _layer_types(model: ModelSpec, config: Config) -> list[bool] | None:
    """Tells whether each layer has a window; None where ``layer_types`` is absent."""
    types = config.get("layer_types")
    if types is None:
        return None
    if (
        not isinstance(types, list)
        or len(types) != model.num_layers
        or any(name not in (_LOCAL, _GLOBAL) for name in types)
    ):
        problem = f"does not name {_LOCAL} or {_GLOBAL} for each of {model.num_layers} layers"
        raise refusal("layer_types", types, problem)
    return [name == _LOCAL for name in types]


def _windows(config: Config, has_window: Sequence[bool]) -> tuple[int | None, ...]:
    """Returns ``sliding_window`` for each layer that has one and None for the others; empty where no layer has one."""
    if not any(has_window):
        return ()
    window = whole_number(config, "sliding_window", maximum=MAX_CONTEXT)
    return tuple(window if has else None for has in has_window)


def _reached(model: ModelSpec, windows: tuple[int | None, ...]) -> tuple[int | None, ...]:
    """Returns the windows, or nothing where no context is ever longer than they are."""
    lengths = [window for window in windows if window is not None]
    return windows if lengths and min(lengths) < model.max_context_tokens else ()


_QWEN_DEFAULTS: Mapping[str, object] = {"sliding_window": 4096, "max_window_layers": 28}
_GEMMA_DEFAULTS: Mapping[str, object] = {"head_dim": 256, "tie_word_embeddings": True}

FAMILIES: Mapping[Architecture, Family] = {
    "llama": Family(model_class="LlamaForCausalLM", complete=_llama),
    "mistral": Family(model_class="MistralForCausalLM", complete=_mistral, defaults={"sliding_window": 4096}),
    "qwen2": Family(model_class="Qwen2ForCausalLM", complete=_qwen2, defaults=_QWEN_DEFAULTS),
    "qwen3": Family(model_class="Qwen3ForCausalLM", complete=_qwen3, defaults={**_QWEN_DEFAULTS, "head_dim": 128}),
    "gemma": Family(
        model_class="GemmaForCausalLM",
        complete=_gemma,
        defaults={**_GEMMA_DEFAULTS, "hidden_act": "gelu_pytorch_tanh"},
        # Early files say "gelu"; their models were trained with its approximation all the same.
        activations={**_ACTIVATIONS, "gelu": "gelu_tanh"},
    ),
    "gemma3_text": Family(
        model_class="Gemma3ForCausalLM",
        complete=_gemma3,
        defaults={
            **_GEMMA_DEFAULTS,
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "sliding_window_pattern": 6,
        },
        activation_key="hidden_activation",
        ropes=read_layered_ropes,
    ),
}
