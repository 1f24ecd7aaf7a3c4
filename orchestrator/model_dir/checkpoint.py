"""Finds the tensors of a checkpoint, and checks that they are those that the model's configuration promises."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from orchestrator.model_dir.directory import exists, list_directory, read_bytes, readable
from orchestrator.model_dir.stored import StoredTensor, are_equal, read_header
from placement.errors import InvalidModel
from placement.model.checkpoint_files import FIX_AGAIN, INDEX_FILE, MAX_INDEX_BYTES, SINGLE_FILE, parse_index
from placement.model.missing_files import no_weights
from placement.model.specs import ModelSpec
from placement.model.weights import EMBEDDING, HEAD, TensorSlice, stored_name

HEAD_DIFFERS = (
    f"config.json says tie_word_embeddings, and the {HEAD} of the files is not the embedding: "
    "the files' head is used, and takes memory of its own"
)
_FIX_HEAD = (
    "Set tie_word_embeddings to true in config.json if the embedding is the output head too; "
    "otherwise export the model again."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The headers of a model's safetensors files.

    Attributes:
        owners: the file of each tensor.
        headers: the tensors that each file has.
        num_bytes: the size of all files.
    """

    owners: Mapping[str, str]
    headers: Mapping[str, Mapping[str, StoredTensor]]
    num_bytes: int

    def find(self, name: str) -> StoredTensor | None:
        """Finds a tensor; None where no file has it."""
        return self.headers.get(self.owners.get(name, ""), {}).get(name)

    def file_of(self, name: str) -> str:
        """Names the file that has a tensor, or should have it."""
        return self.owners.get(name, SINGLE_FILE if SINGLE_FILE in self.headers else INDEX_FILE)


def read_checkpoint(directory: Path) -> Checkpoint:
    """Reads all headers. A single file wins over an index, as it does in transformers and the workers.

    Raises:
        InvalidModel: a file is missing or damaged.
    """
    if exists(directory, SINGLE_FILE):
        owners = dict.fromkeys(read_header(directory, SINGLE_FILE), SINGLE_FILE)
    elif exists(directory, INDEX_FILE):
        owners = parse_index(read_bytes(directory, INDEX_FILE, MAX_INDEX_BYTES))
    else:
        raise no_weights(list_directory(directory))
    headers = {name: read_header(directory, name) for name in sorted(set(owners.values()))}
    with readable(directory):
        num_bytes = sum((directory / name).stat().st_size for name in headers)
    return Checkpoint(owners=owners, headers=headers, num_bytes=num_bytes)


def is_tied(spec: ModelSpec, checkpoint: Checkpoint) -> bool:
    """Tells whether the embedding is the output head too: where both are saved, they must be equal, too.

    As transformers does, the files are believed where they contradict the configuration.
    """
    if not spec.tied_embeddings:
        return False
    embedding, head = checkpoint.find(EMBEDDING), checkpoint.find(HEAD)
    return embedding is None or head is None or are_equal(embedding, head)


def check_tensors(
    tensors: Iterable[tuple[TensorSlice, tuple[str, ...]]], checkpoint: Checkpoint, *, is_tied: bool
) -> None:
    """Checks that the files have the tensors, each of one of its number types. Raises InvalidModel."""
    for wanted, dtypes in tensors:
        name = stored_name(wanted.name, checkpoint.owners) if is_tied else wanted.name
        file, found = checkpoint.file_of(name), checkpoint.find(name)
        if found is None:
            fix = _FIX_HEAD if name == HEAD else FIX_AGAIN
            raise InvalidModel(field=file, problem=f"lacks the tensor {name}", fix=fix)
        if found.shape != wanted.shape:
            raise InvalidModel(
                field=f"{file}: {name}",
                value=list(found.shape),
                problem=f"has another shape than config.json says, which is {list(wanted.shape)}",
                fix="Use the config.json that was saved with these weights.",
            )
        if found.dtype not in dtypes:
            raise InvalidModel(
                field=f"{file}: {name}",
                value=found.dtype,
                problem="is of a number type that is not served",
                fix=f"Save the model as one of {', '.join(dtypes)}.",
            )
