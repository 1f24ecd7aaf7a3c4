import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from tests.support.grammars import DEMO, EOS, VOCAB_SIZE


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(DEMO / "tokenizer.json"))


@pytest.fixture(scope="module")
def closing(tokenizer: Tokenizer) -> Tensor:
    """Makes a bias [V] by which the model of these tests prefers tokens that bring an answer to its end."""
    bias = torch.zeros(VOCAB_SIZE)
    for token, token_id in tokenizer.get_vocab().items():
        bias[token_id] = 2.0 * sum(character in '"}])' for character in token) - 0.3 * len(token)
    bias[list(EOS)] = 3.0
    return bias
