"""The served model as the gateway sees it: its name, limits, defaults and tokenizer."""

from dataclasses import dataclass

from tokenizers import Tokenizer

from placement.specs import DType, ModelSpec
from placement.weights import num_parameters
from protos.heterodyne.v1 import inference_pb2 as pb


@dataclass(frozen=True, slots=True, kw_only=True)
class DefaultSampling:
    """What absent sampling fields mean: the model's generation_config.json, else greedy."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """Everything the gateway knows of the model."""

    name: str
    spec: ModelSpec
    dtype: DType
    max_context_tokens: int
    tokenizer: Tokenizer
    max_token_bytes: int
    defaults: DefaultSampling

    def message(self) -> pb.Model:
        """The model as clients see it."""
        return pb.Model(
            name=self.name,
            architecture=self.spec.architecture,
            num_parameters=num_parameters(self.spec),
            max_context_tokens=self.max_context_tokens,
            vocab_size=self.spec.vocab_size,
            dtype=self.dtype.value,
            eos_token_ids=self.spec.eos_token_ids,
            default_sampling=pb.SamplingParams(
                temperature=self.defaults.temperature, top_k=self.defaults.top_k, top_p=self.defaults.top_p
            ),
        )


def default_sampling(generation_config: dict[str, object]) -> DefaultSampling:
    """The defaults that generation_config.json sets; greedy unless it says ``do_sample``."""
    if not generation_config.get("do_sample"):
        return DefaultSampling()

    def number(key: str, default: float) -> float:
        value = generation_config.get(key)
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else default

    return DefaultSampling(
        temperature=number("temperature", 1.0), top_k=int(number("top_k", 50)), top_p=number("top_p", 1.0)
    )


def longest_token_bytes(tokenizer: Tokenizer) -> int:
    """Bytes of UTF-8 that the longest token can stand for: bounds the tokens of a text from below."""
    return max((len(token.encode()) for token in tokenizer.get_vocab(with_added_tokens=True)), default=1)
