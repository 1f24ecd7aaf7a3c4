"""Reads a model directory in the Hugging Face layout: its configuration, tokenizer and headers, but no weights.

:mod:`orchestrator.model_dir.directory` opens the files.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from orchestrator.model_dir.chat import LEAVES_OUT, ChatTemplate, template_source
from orchestrator.model_dir.checkpoint import HEAD_DIFFERS, check_tensors, is_tied, read_checkpoint
from orchestrator.model_dir.default_sampling import DefaultSampling, default_sampling
from orchestrator.model_dir.directory import (
    exists,
    read_bytes,
    read_json,
    read_json_if_there,
    read_tokenizer_of,
    readable,
)
from placement.errors import InvalidModel
from placement.model.checkpoint_files import FIX_AGAIN, MAX_CONFIG_BYTES
from placement.model.hf import read_model_spec
from placement.model.missing_files import no_directory
from placement.model.quantization import checkpoint_tensors, read_gptq
from placement.model.special_tokens import TOKENIZER_CONFIG, TokenFiles, special_texts
from placement.model.specs import ModelSpec
from placement.model.tokenizer_json import TOKENIZER, CompleteTokenizer
from placement.model.weights import whole_model

MAX_TEMPLATE_BYTES = 2**20
_MOST_NAMED = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """The content of a model directory that was found sound.

    Attributes:
        config: the content of config.json.
        defaults: the sampling parameters that generation_config.json recommends.
        chat_template: the chat template; None where the model has none, as base models do.
        tokenizer_config: the content of tokenizer_config.json; empty where there is none.
        checkpoint_bytes: the size of all safetensors files.
        warnings: what is odd about the directory, and served all the same, each in a clause.
    """

    config: Mapping[str, Any]
    spec: ModelSpec
    defaults: DefaultSampling
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    tokenizer_config: Mapping[str, Any]
    checkpoint_bytes: int
    warnings: tuple[str, ...]


def read_model_files(directory: Path, *, tied_embeddings: bool | None = None) -> ModelFiles:
    """Reads the directory, and checks that everything in it fits together.

    Args:
        tied_embeddings: whether the embedding is the output head too, where that was decided before.

    Raises:
        InvalidConfig: ``directory`` is no directory.
        InvalidModel: a file is missing, damaged, too large, outside the directory, or contradicts another.
    """
    directory = _found(directory)
    config = read_json(directory, "config.json", MAX_CONFIG_BYTES)
    generation = read_json_if_there(directory, "generation_config.json", MAX_CONFIG_BYTES)
    configured = read_model_spec(config, generation)
    complete = read_tokenizer_of(directory, vocab_size=configured.vocab_size)
    tokenizer = _make_tokenizer(complete.text)
    checkpoint = read_checkpoint(directory)
    spec = replace(
        configured,
        eos_token_ids=complete.eos_token_ids(configured.eos_token_ids),
        tied_embeddings=is_tied(configured, checkpoint) if tied_embeddings is None else tied_embeddings,
    )
    tensors = checkpoint_tensors(whole_model(spec), read_gptq(config))
    check_tensors(tensors, checkpoint, is_tied=spec.tied_embeddings)
    chat_template = _read_chat_template(directory, complete.files)
    keeps_words = chat_template is None or chat_template.learn_forms()
    return ModelFiles(
        config=config,
        spec=spec,
        defaults=default_sampling(generation),
        tokenizer=tokenizer,
        chat_template=chat_template,
        tokenizer_config=complete.files.config,
        checkpoint_bytes=checkpoint.num_bytes,
        warnings=(
            *((_left_out(complete, spec),) if complete.left_out else ()),
            *((HEAD_DIFFERS,) if configured.tied_embeddings and not spec.tied_embeddings else ()),
            *(() if keeps_words else (f"chat requests will be refused: {LEAVES_OUT}",)),
        ),
    )


def _found(directory: Path) -> Path:
    """Returns the real path of the directory. Raises InvalidConfig, InvalidModel."""
    with readable(directory):
        if directory.is_dir():
            return directory.resolve()
        above = next(parent for parent in directory.absolute().parents if parent.is_dir())
        missing = directory.absolute().relative_to(above)
        raise no_directory(str(directory), is_there=directory.exists(), missing=str(missing))


def _left_out(tokenizer: CompleteTokenizer, spec: ModelSpec) -> str:
    """Says which tokens are left out, and why."""
    named = ", ".join(map(repr, tokenizer.left_out[:_MOST_NAMED]))
    more = ", …" if len(tokenizer.left_out) > _MOST_NAMED else ""
    return f"tokens whose ids are not below vocab_size = {spec.vocab_size} are left out: {named}{more}"


def _make_tokenizer(text: str) -> Tokenizer:
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # the library has no type of its own for what it cannot read
        problem = f"cannot be read as a tokenizer: {error}"
        fix = "Save the tokenizer again as a fast one: tokenizer.save_pretrained(path)."
        raise InvalidModel(field=TOKENIZER, problem=problem, fix=fix) from None


def _read_chat_template(directory: Path, files: TokenFiles) -> ChatTemplate | None:
    """Reads the template in chat_template.jinja, or else that in tokenizer_config.json, as transformers does."""
    file = "chat_template.jinja"
    if exists(directory, file):
        data = read_bytes(directory, file, MAX_TEMPLATE_BYTES)
        try:
            source: str | None = data.decode()
        except UnicodeDecodeError as error:
            raise InvalidModel(field=file, problem=f"is not UTF-8: {error}", fix=FIX_AGAIN) from None
        field = file
    else:
        source, field = template_source(files.config), f"{TOKENIZER_CONFIG}: chat_template"
    return None if source is None else ChatTemplate(source, special_tokens=special_texts(files), field=field)
