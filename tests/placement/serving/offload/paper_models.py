"""The models of published measurements, as far as decisions depend on them."""

from placement.model.specs import ModelSpec, RopeSpec


def llama(
    *, num_layers: int, num_heads: int, num_kv_heads: int, ffn_size: int, vocab_size: int, head_dim: int = 128
) -> ModelSpec:
    return ModelSpec(
        architecture="llama",
        num_layers=num_layers,
        hidden_size=num_heads * head_dim,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        ffn_size=ffn_size,
        vocab_size=vocab_size,
        max_context_tokens=131_072,
        rms_norm_eps=1e-5,
        rope=RopeSpec(),
        tied_embeddings=False,
    )


LLAMA3_70B = llama(num_layers=80, num_heads=64, num_kv_heads=8, ffn_size=28_672, vocab_size=128_256)
LLAMA_65B = llama(num_layers=80, num_heads=64, num_kv_heads=64, ffn_size=22_016, vocab_size=32_000)
LLAMA_33B = llama(num_layers=60, num_heads=52, num_kv_heads=52, ffn_size=17_920, vocab_size=32_000)
