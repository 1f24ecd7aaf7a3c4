"""Reads a model directory in the Hugging Face layout, but of the weights only headers.

Every file is opened below the directory only; a symlink or an index that leads out of it is refused.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from orchestrator.model_dir.chat import ChatTemplate, read_special_tokens, template_source
from orchestrator.model_dir.default_sampling import DefaultSampling, default_sampling
from placement.errors import InvalidConfig, InvalidModel
from placement.model.hf import read_model_spec
from placement.model.quantization import checkpoint_tensors, read_gptq
from placement.model.specs import ModelSpec
from placement.model.weights import TensorSlice, whole_model

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TOKENIZER = "tokenizer.json"
MAX_CONFIG_BYTES = 2**20
MAX_INDEX_BYTES = 2**26
MAX_TOKENIZER_BYTES = 2**28
MAX_TOKENIZER_CONFIG_BYTES = 2**24
MAX_TEMPLATE_BYTES = 2**20
_FIX_AGAIN = "Download or export the model again."


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """A model directory that was found sound.

    Attributes:
        config: the content of config.json.
        tokenizer_file: what ``tokenizer`` was read from.
        defaults: what generation_config.json says of sampling.
        chat_template: None where there is none, as in base models.
        checkpoint_bytes: size of the safetensors files.
    """

    config: Mapping[str, Any]
    spec: ModelSpec
    defaults: DefaultSampling
    tokenizer: Tokenizer
    tokenizer_file: Path
    chat_template: ChatTemplate | None
    checkpoint_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tensor:
    dtype: str
    shape: tuple[int, ...]


def read_model_files(directory: Path) -> ModelFiles:
    """Returns what the directory holds, once everything in it was found to fit together.

    Raises:
        InvalidConfig: ``directory`` is no directory.
        InvalidModel: a file is missing, damaged, too large, outside the directory, or contradicts another.
    """
    if not directory.is_dir():
        problem = "is not a directory" if directory.exists() else "does not exist"
        fix = "Give the directory that holds config.json and the safetensors files."
        raise InvalidConfig(field="model.path", value=str(directory), problem=problem, fix=fix)
    directory = directory.resolve()
    config = _read_json(directory, "config.json", MAX_CONFIG_BYTES)
    generation = _read_json_if_there(directory, "generation_config.json", MAX_CONFIG_BYTES)
    spec = read_model_spec(config, generation)
    defaults = default_sampling(generation)
    tokenizer = _read_tokenizer(directory, spec)
    owners = _owners(directory)
    headers = {name: _read_header(directory, name) for name in sorted(set(owners.values()))}
    _check_tensors(checkpoint_tensors(whole_model(spec), read_gptq(config)), owners, headers)
    return ModelFiles(
        config=config,
        spec=spec,
        defaults=defaults,
        tokenizer=tokenizer,
        tokenizer_file=_inside(directory, TOKENIZER),
        chat_template=_read_chat_template(directory),
        checkpoint_bytes=sum((directory / name).stat().st_size for name in headers),
    )


def _owners(directory: Path) -> dict[str, str]:
    """Returns the file that holds each tensor. A single file goes before an index, as for transformers and workers."""
    if (directory / SINGLE).exists():
        return dict.fromkeys(_read_header(directory, SINGLE), SINGLE)
    if not (directory / INDEX).exists():
        pickled = sorted(p.name for kind in ("*.bin", "*.pt", "*.pth") for p in directory.glob(kind))
        if pickled:
            problem = "holds weights as pickles only, which can run code and are never loaded"
            fix = "Save the model as safetensors: model.save_pretrained(path, safe_serialization=True)."
            raise InvalidModel(field="model.path", value=pickled[0], problem=problem, fix=fix)
        raise _missing(SINGLE)
    weight_map = _read_json(directory, INDEX, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        problem = "does not map tensors to files"
        raise InvalidModel(field=f"{INDEX}: weight_map", value=weight_map, problem=problem, fix=_FIX_AGAIN)
    for name in weight_map.values():
        _check_shard_name(name)
    return weight_map


def _check_shard_name(name: str) -> None:
    """Raises InvalidModel unless ``name`` is that of a safetensors file right beside the index."""
    if Path(name).name != name or "\\" in name or "\0" in name:
        problem, fix = "names a file that is not right in the model directory", _FIX_AGAIN
    elif not name.endswith(".safetensors"):
        problem = "names a file of another kind"
        fix = "Only safetensors files are loaded; save the model as such."
    else:
        return
    raise InvalidModel(field=INDEX, value=name, problem=problem, fix=fix)


def _read_header(directory: Path, name: str) -> dict[str, _Tensor]:
    """Returns the tensors of one safetensors file; the library checks sizes, overlaps and the file's length."""
    path = _inside(directory, name)
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            return {key: _Tensor(dtype=part.get_dtype(), shape=tuple(part.get_shape())) for key, part in slices.items()}
    except (SafetensorError, OSError) as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        problem = f"is damaged or truncated: {reason}"
        raise InvalidModel(field=name, value=path.stat().st_size, problem=problem, fix=_FIX_AGAIN) from None


def _check_tensors(
    tensors: Iterable[tuple[TensorSlice, tuple[str, ...]]],
    owners: Mapping[str, str],
    headers: Mapping[str, Mapping[str, _Tensor]],
) -> None:
    """Raises InvalidModel unless the files have the tensors, each in one of its number types."""
    for wanted, dtypes in tensors:
        file = owners.get(wanted.name, SINGLE if SINGLE in headers else INDEX)
        found = headers.get(file, {}).get(wanted.name)
        if found is None:
            raise InvalidModel(field=file, value=wanted.name, problem="lacks a tensor", fix=_FIX_AGAIN)
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


def _read_tokenizer(directory: Path, spec: ModelSpec) -> Tokenizer:
    """Returns the tokenizer, once its ids were found to fit the model."""
    name = TOKENIZER
    _check_vocabulary(_read_json(directory, name, MAX_TOKENIZER_BYTES), spec)
    try:
        return Tokenizer.from_file(str(_inside(directory, name)))
    except Exception as error:  # the library has no type of its own for what it cannot read
        problem = f"cannot be read as a tokenizer: {error}"
        fix = "Save the tokenizer again as a fast one: tokenizer.save_pretrained(path)."
        raise InvalidModel(field=name, value=None, problem=problem, fix=fix) from None


def _check_vocabulary(tokenizer: Mapping[str, Any], spec: ModelSpec) -> None:
    """Refuses a tokenizer that makes an id for which the embedding has no row."""
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        ids: list[Any] = list(vocabulary.values())
    elif isinstance(vocabulary, list):
        ids = [len(vocabulary) - 1]
    else:
        fix = "Save the tokenizer as a fast one: tokenizer.save_pretrained(path)."
        raise InvalidModel(field=TOKENIZER, value=None, problem="has no model.vocab", fix=fix)
    added = tokenizer.get("added_tokens") or []
    ids += [token.get("id") if isinstance(token, dict) else None for token in added]
    if not all(isinstance(token_id, int) for token_id in ids):
        problem = "has a token whose id is not a number"
        raise InvalidModel(field=TOKENIZER, value=None, problem=problem, fix=_FIX_AGAIN)
    largest = max(ids, default=-1)
    if largest >= spec.vocab_size:
        raise InvalidModel(
            field=TOKENIZER,
            value=largest,
            problem=f"has a token id that is not below vocab_size = {spec.vocab_size} of config.json",
            fix="Use the tokenizer.json that was saved with the model.",
        )


def _read_chat_template(directory: Path) -> ChatTemplate | None:
    """Returns the template in chat_template.jinja, else the one in tokenizer_config.json, as transformers does."""
    file, config = "chat_template.jinja", "tokenizer_config.json"
    values = _read_json_if_there(directory, config, MAX_TOKENIZER_CONFIG_BYTES)
    special_tokens = read_special_tokens(
        values, _read_json_if_there(directory, "special_tokens_map.json", MAX_CONFIG_BYTES)
    )
    if (directory / file).exists():
        data = _read_bytes(directory, file, MAX_TEMPLATE_BYTES)
        try:
            source: str | None = data.decode()
        except UnicodeDecodeError as error:
            raise InvalidModel(field=file, value=len(data), problem=f"is not UTF-8: {error}", fix=_FIX_AGAIN) from None
        field = file
    else:
        source, field = template_source(values), f"{config}: chat_template"
    return None if source is None else ChatTemplate(source, special_tokens=special_tokens, field=field)


def _read_json_if_there(directory: Path, name: str, limit_bytes: int) -> dict[str, Any]:
    return _read_json(directory, name, limit_bytes) if (directory / name).exists() else {}


def _read_json(directory: Path, name: str, limit_bytes: int) -> dict[str, Any]:
    data = _read_bytes(directory, name, limit_bytes)
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        problem = f"is not valid JSON: {error}"
    else:
        if isinstance(values, dict):
            return values
        problem = "is not a JSON object"
    raise InvalidModel(field=name, value=len(data), problem=problem, fix=_FIX_AGAIN)


def _read_bytes(directory: Path, name: str, limit_bytes: int) -> bytes:
    path = _inside(directory, name)
    try:
        with path.open("rb") as file:
            data = file.read(limit_bytes + 1)
    except OSError as error:
        problem = f"cannot be read: {(error.strerror or str(error)).lower()}"
    else:
        if len(data) <= limit_bytes:
            return data
        problem = f"is larger than {limit_bytes} bytes"
    raise InvalidModel(field=name, value=path.stat().st_size, problem=problem, fix=_FIX_AGAIN)


def _inside(directory: Path, name: str) -> Path:
    """Returns the real path of a file of the directory."""
    path = (directory / name).resolve()
    if not path.is_relative_to(directory):
        raise InvalidModel(
            field=name,
            value=name,
            problem="leads out of the model directory",
            fix="Put the file itself there, as `hf download MODEL --local-dir DIRECTORY` does.",
        )
    if not path.is_file():
        raise _missing(name)
    return path


def _missing(name: str) -> InvalidModel:
    return InvalidModel(field="model.path", value=name, problem="lacks a file", fix=_FIX_AGAIN)
