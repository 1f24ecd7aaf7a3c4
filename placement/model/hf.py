"""Reads Hugging Face's ``config.json`` into a :class:`ModelSpec`.

Owns the values that every family of models has alike. Pure: the caller reads the files.
"""

from dataclasses import replace

from placement.model.hf_families import family_of
from placement.model.hf_rope import context_tokens
from placement.model.hf_values import MAX_CONTEXT, Config, flag, positive, refusal, whole_number
from placement.model.quantization import read_gptq
from placement.model.specs import DType, ModelSpec

MAX_LAYERS = 1024
MAX_HEADS = 4096
MAX_HEAD_DIM = 1024
MAX_WIDTH = 1 << 20
MAX_VOCAB = 1 << 22


def read_model_spec(config: Config, generation_config: Config | None = None) -> ModelSpec:
    """Reads the model that a ``config.json`` (and ``generation_config.json``, where there is one) describes.

    It understands the layouts of transformers 4 and 5. ``ladder_residual: true`` is our own key, of models that were
    trained in that manner. :func:`saved_dtype` reads the number type, :mod:`placement.model.quantization` the format.

    Raises:
        InvalidModel: a value is missing, of the wrong type, impossible, or of a model that is not served.
    """
    architecture, family = family_of(config)
    read_gptq(config)
    config = {**family.defaults, **config}
    num_heads, num_kv_heads = _head_counts(config)
    hidden_size = whole_number(config, "hidden_size", maximum=MAX_WIDTH)
    vocab_size = whole_number(config, "vocab_size", maximum=MAX_VOCAB)
    rope, local_rope = family.ropes(config)
    model = ModelSpec(
        architecture=architecture,
        num_layers=whole_number(config, "num_hidden_layers", maximum=MAX_LAYERS),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=_head_dim(config, hidden_size=hidden_size, num_heads=num_heads),
        ffn_size=whole_number(config, "intermediate_size", maximum=MAX_WIDTH),
        vocab_size=vocab_size,
        max_context_tokens=context_tokens(rope, whole_number(config, "max_position_embeddings", maximum=MAX_CONTEXT)),
        rms_norm_eps=positive(config, "rms_norm_eps", maximum=1.0),
        rope=rope,
        local_rope=local_rope,
        activation=family.activation(config),
        tied_embeddings=flag(config, "tie_word_embeddings"),
        eos_token_ids=_eos_token_ids(config, generation_config, vocab_size),
    )
    model = family.complete(model, config)
    if not flag(config, "ladder_residual"):
        return model
    if model.post_norms:
        raise refusal("ladder_residual", True, f"is not known of {architecture}, which norms what it adds")
    return replace(model, ladder=True)


def saved_dtype(config: Config) -> DType:
    """Reads the number type that the model was saved in; it is float32 where the file names none.

    The key is ``dtype`` (transformers 5) or ``torch_dtype`` (4).

    Raises:
        InvalidModel: the number type is not served.
    """
    key = "dtype" if config.get("dtype") is not None else "torch_dtype"
    name = config.get(key)
    if name is None:
        return DType.FLOAT32
    if name in ("float32", "bfloat16"):
        return DType(name)
    fix = "Set model.dtype to bfloat16 or float32 in the cluster file: weights are converted while they load."
    raise refusal(key, name, "is not a number type that is served", fix)


def _head_counts(config: Config) -> tuple[int, int]:
    """Reads the numbers of query heads and of KV heads."""
    num_heads = whole_number(config, "num_attention_heads", maximum=MAX_HEADS)
    num_kv_heads = whole_number(config, "num_key_value_heads", default=num_heads, maximum=MAX_HEADS)
    if num_heads % num_kv_heads:
        raise refusal("num_key_value_heads", num_kv_heads, f"does not divide num_attention_heads = {num_heads}")
    return num_heads, num_kv_heads


def _head_dim(config: Config, *, hidden_size: int, num_heads: int) -> int:
    """Reads the head dimension, or divides the hidden size by the heads where the file has none."""
    if config.get("head_dim") is None and hidden_size % num_heads:
        raise refusal(
            "hidden_size", hidden_size, f"is not a multiple of num_attention_heads = {num_heads}",
            "Give head_dim, or sizes that divide.",
        )  # fmt: skip
    head_dim = whole_number(config, "head_dim", default=hidden_size // num_heads, maximum=MAX_HEAD_DIM)
    if head_dim % 2:
        raise refusal("head_dim", head_dim, "is odd, and rotary embeddings turn pairs")
    return head_dim


def _eos_token_ids(config: Config, generation_config: Config | None, vocab_size: int) -> tuple[int, ...]:
    """Reads the ids that end a sequence. ``generation_config.json`` wins, since chat models list more there."""
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
            raise refusal("eos_token_id", given, problem, file=file)
        checked.append(token_id)
    return tuple(dict.fromkeys(checked))
