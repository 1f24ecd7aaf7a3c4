"""Models as placement sees them, of which there are no weights."""

from placement.model.specs import ModelSpec, RopeSpec

LLAMA_8B = ModelSpec(
    architecture="llama",
    num_layers=32,
    hidden_size=4096,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    ffn_size=14336,
    vocab_size=128_256,
    max_context_tokens=8192,
    rms_norm_eps=1e-5,
    rope=RopeSpec(),
    tied_embeddings=False,
)
