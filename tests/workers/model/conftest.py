from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.quantized import SIZES
from tests.support.tokenizer import save_tokenizer


@pytest.fixture(scope="module")
def served(llama_checkpoint: Callable[..., Path]) -> Path:
    directory = llama_checkpoint(seed=11, **SIZES)
    save_tokenizer(directory)
    return directory
