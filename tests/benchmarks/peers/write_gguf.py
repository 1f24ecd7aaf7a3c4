"""Write a checkpoint of the Llama family as a bf16 GGUF without a tokenizer: ``write_gguf.py DIRECTORY FILE``.

Runs in llama.cpp's own virtual environment, whose ``gguf`` package knows the format.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter

_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def gguf_name(name: str) -> str:
    """``model.layers.3.mlp.up_proj.weight`` to ``blk.3.ffn_up.weight``."""
    if name in _NAMES:
        return _NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{_LAYER_NAMES[rest.removesuffix('.weight')]}.weight"


def interleave(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """llama.cpp turns neighbours in a head; Hugging Face turns its first half against its second."""
    outputs, inputs = rows.shape
    halves = rows.reshape(num_heads, 2, outputs // num_heads // 2, inputs)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(outputs, inputs)


def write(directory: Path, file: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    partial = file.with_suffix(".partial")
    writer = GGUFWriter(partial, "llama")
    add_parameters(writer, config)
    source = directory / "model.safetensors"
    with source.open("rb") as reader:
        size = int.from_bytes(reader.read(8), "little")
        header: dict[str, Any] = json.loads(reader.read(size))
    header.pop("__metadata__", None)
    for name, entry in header.items():
        assert entry["dtype"] == "BF16", name
        bits = np.memmap(source, np.uint16, "r", 8 + size + entry["data_offsets"][0], tuple(entry["shape"]))
        add_tensor(writer, name, bits, config)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(file)


def add_parameters(writer: GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")


def add_tensor(writer: GGUFWriter, name: str, bits: np.ndarray, config: dict[str, Any]) -> None:
    """``bits`` are bfloat16 numbers; norms are float32 in a GGUF."""
    if bits.ndim == 1:
        writer.add_tensor(gguf_name(name), (bits.astype(np.uint32) << 16).view(np.float32))
        return
    if name.endswith("q_proj.weight"):
        bits = interleave(bits, config["num_attention_heads"])
    elif name.endswith("k_proj.weight"):
        bits = interleave(bits, config["num_key_value_heads"])
    writer.add_tensor(gguf_name(name), bits.view(np.uint8), raw_dtype=GGMLQuantizationType.BF16)


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]))
