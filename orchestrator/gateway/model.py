"""Describes the served model: its name, limits, defaults and tokenizer."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from orchestrator.model_dir.chat import ChatTemplate
from orchestrator.model_dir.default_sampling import DefaultSampling
from placement.model.specs import DType, ModelSpec
from placement.model.weights import num_parameters
from protos.heterodyne.v1 import inference_pb2 as pb


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """Holds everything the gateway knows of the model.

    Attributes:
        directory: where ``tokenizer`` was read from; None where it was made in memory.
        chat_template: writes conversations out as prompts; None where the model has none.
        tokenizer_config: the content of the model's tokenizer_config.json.
    """

    name: str
    spec: ModelSpec
    dtype: DType
    max_context_tokens: int
    tokenizer: Tokenizer
    max_token_bytes: int
    defaults: DefaultSampling
    chat_template: ChatTemplate | None = None
    directory: Path | None = None
    tokenizer_config: Mapping[str, Any] = field(default_factory=dict)

    def message(self) -> pb.Model:
        """Returns the model as clients see it."""
        return pb.Model(
            name=self.name,
            architecture=self.spec.architecture,
            num_parameters=num_parameters(self.spec),
            max_context_tokens=self.max_context_tokens,
            vocab_size=self.spec.vocab_size,
            dtype=self.dtype.value,
            eos_token_ids=self.spec.eos_token_ids,
            default_sampling=self.defaults.message(),
        )


def longest_token_bytes(tokenizer: Tokenizer) -> int:
    """Returns the bytes of UTF-8 that the longest token stands for, which bounds the tokens of a text from below."""
    return max((len(token.encode()) for token in tokenizer.get_vocab(with_added_tokens=True)), default=1)
