"""A tokenizer whose tokens are single bytes, and the two special ones around calls of tools."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

MARKS = {256: "<tool_call>", 257: "</tool_call>"}
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def bytes_alone() -> Tokenizer:
    """A token for each byte, and two special ones, as Qwen's for calls are."""
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(BYTES)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in MARKS.values()])
    return tokenizer
