"""Reads a model directory in the Hugging Face layout: its configuration, tokenizer and headers, but no weights.

:mod:`orchestrator.model_dir.directory` opens the files.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from orchestrator.model_dir.chat import ChatTemplate, template_source
from orchestrator.model_dir.default_sampling import DefaultSampling, default_sampling
from orchestrator.model_dir.directory import (
    inside,
    list_directory,
    read_bytes,
    read_json,
    read_json_if_there,
    read_tokenizer_of,
)
from placement.errors import InvalidConfig, InvalidModel
from placement.model.checkpoint_files import (
    FIX_AGAIN,
    INDEX_FILE,
    MAX_CONFIG_BYTES,
    MAX_INDEX_BYTES,
    SINGLE_FILE,
    is_lfs_pointer,
    lfs_pointer,
    parse_index,
)
from placement.model.hf import read_model_spec
from placement.model.missing_files import no_weights
from placement.model.quantization import checkpoint_tensors, read_gptq
from placement.model.special_tokens import TOKENIZER_CONFIG, TokenFiles, special_texts
from placement.model.specs import ModelSpec
from placement.model.tokenizer_json import TOKENIZER
from placement.model.weights import TensorSlice, whole_model

MAX_TEMPLATE_BYTES = 2**20
_POINTER_BYTES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """The content of a model directory that was found sound.

    Attributes:
        config: the content of config.json.
        defaults: the sampling parameters that generation_config.json recommends.
        chat_template: the chat template; None where the model has none, as base models do.
        checkpoint_bytes: the size of all safetensors files.
    """

    config: Mapping[str, Any]
    spec: ModelSpec
    defaults: DefaultSampling
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    checkpoint_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tensor:
    """A tensor as the header of a safetensors file describes it."""

    dtype: str
    shape: tuple[int, ...]


def read_model_files(directory: Path) -> ModelFiles:
    """Reads the directory, and checks that everything in it fits together.

    Raises:
        InvalidConfig: ``directory`` is no directory.
        InvalidModel: a file is missing, damaged, too large, outside the directory, or contradicts another.
    """
    if not directory.is_dir():
        problem = "is not a directory" if directory.exists() else "does not exist"
        fix = "Give the directory that holds config.json and the safetensors files."
        raise InvalidConfig(field="model.path", value=str(directory), problem=problem, fix=fix)
    directory = directory.resolve()
    config = read_json(directory, "config.json", MAX_CONFIG_BYTES)
    generation = read_json_if_there(directory, "generation_config.json", MAX_CONFIG_BYTES)
    spec = read_model_spec(config, generation)
    defaults = default_sampling(generation)
    complete = read_tokenizer_of(directory, vocab_size=spec.vocab_size)
    spec = replace(spec, eos_token_ids=complete.eos_token_ids(spec.eos_token_ids))
    owners = _owners(directory)
    headers = {name: _read_header(directory, name) for name in sorted(set(owners.values()))}
    _check_tensors(checkpoint_tensors(whole_model(spec), read_gptq(config)), owners, headers)
    return ModelFiles(
        config=config,
        spec=spec,
        defaults=defaults,
        tokenizer=_make_tokenizer(complete.text),
        chat_template=_read_chat_template(directory, complete.files),
        checkpoint_bytes=sum((directory / name).stat().st_size for name in headers),
    )


def _owners(directory: Path) -> dict[str, str]:
    """Finds the file of each tensor. A single file wins over an index, as it does in transformers and the workers."""
    if (directory / SINGLE_FILE).exists():
        return dict.fromkeys(_read_header(directory, SINGLE_FILE), SINGLE_FILE)
    if not (directory / INDEX_FILE).exists():
        raise no_weights(list_directory(directory))
    return parse_index(read_bytes(directory, INDEX_FILE, MAX_INDEX_BYTES))


def _read_header(directory: Path, name: str) -> dict[str, _Tensor]:
    """Reads the tensors of a safetensors file; the library checks sizes, overlaps and the file's length."""
    path = inside(directory, name)
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            return {key: _Tensor(dtype=part.get_dtype(), shape=tuple(part.get_shape())) for key, part in slices.items()}
    except (SafetensorError, OSError) as error:
        with path.open("rb") as file:
            if is_lfs_pointer(file.read(_POINTER_BYTES)):
                raise lfs_pointer(name) from None
        reason = str(error).removeprefix("Error while deserializing header: ")
        problem = f"is damaged or truncated: {reason}"
        raise InvalidModel(field=name, problem=problem, fix=FIX_AGAIN) from None


def _check_tensors(
    tensors: Iterable[tuple[TensorSlice, tuple[str, ...]]],
    owners: Mapping[str, str],
    headers: Mapping[str, Mapping[str, _Tensor]],
) -> None:
    """Checks that the files have the tensors, each of one of its number types. Raises InvalidModel."""
    for wanted, dtypes in tensors:
        file = owners.get(wanted.name, SINGLE_FILE if SINGLE_FILE in headers else INDEX_FILE)
        found = headers.get(file, {}).get(wanted.name)
        if found is None:
            raise InvalidModel(field=file, value=wanted.name, problem="lacks a tensor", fix=FIX_AGAIN)
        if found.shape != wanted.shape:
            raise InvalidModel(
                field=f"{file}: {wanted.name}",
                value=list(found.shape),
                problem=f"has another shape than config.json says, which is {list(wanted.shape)}",
                fix="Use the config.json that was saved with these weights.",
            )
        if found.dtype not in dtypes:
            raise InvalidModel(
                field=f"{file}: {wanted.name}",
                value=found.dtype,
                problem="is of a number type that is not served",
                fix=f"Save the model as one of {', '.join(dtypes)}.",
            )


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
    if (directory / file).exists():
        data = read_bytes(directory, file, MAX_TEMPLATE_BYTES)
        try:
            source: str | None = data.decode()
        except UnicodeDecodeError as error:
            raise InvalidModel(field=file, problem=f"is not UTF-8: {error}", fix=FIX_AGAIN) from None
        field = file
    else:
        source, field = template_source(files.config), f"{TOKENIZER_CONFIG}: chat_template"
    return None if source is None else ChatTemplate(source, special_tokens=special_texts(files), field=field)
