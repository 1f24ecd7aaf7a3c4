"""A small byte-level BPE tokenizer, so that a random checkpoint can be served as text."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

_TEXT = ["In the beginning God created the heaven and the earth. ", "And the spirit moved upon the waters: so be it. "]


def save_tokenizer(directory: Path, *, vocab_size: int = 400) -> Tokenizer:
    """Train one of at most ``vocab_size`` tokens and write it beside a checkpoint. Id 1 is <|b|>, id 2 is <|e|>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|pad|>", "<|b|>", "<|e|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT * 20, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    return tokenizer
