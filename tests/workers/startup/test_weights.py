import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from placement.errors import InvalidModel
from placement.model.checkpoint_files import INDEX_FILE, MAX_INDEX_BYTES, SINGLE_FILE
from placement.model.hf import read_model_spec
from placement.model.part import Part, Span
from placement.model.specs import ModelSpec
from placement.model.weights import TensorSlice, shard_tensors, whole_model
from tests.support.hub import hub_snapshot
from workers.startup.checkpoint import load_weights

CPU = torch.device("cpu")
NAME = "model.norm.weight"
WHOLE = TensorSlice(name=NAME, shape=(4, 6), spans=(Span(0, 4), Span(0, 6)))


def spec(path: Path) -> ModelSpec:
    return read_model_spec(json.loads((path / "config.json").read_text()))


def load(path: Path, *slices: TensorSlice, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return load_weights(path, slices, dtype, CPU, lambda loaded, total: None)


def refusal(path: Path, *slices: TensorSlice) -> InvalidModel:
    with pytest.raises(InvalidModel) as caught:
        load(path, *(slices or (WHOLE,)))
    assert caught.value.fix
    return caught.value


def write_index(path: Path, content: object) -> None:
    (path / INDEX_FILE).write_text(json.dumps(content))


def write_raw(path: Path, header: dict[str, Any], data: bytes) -> None:
    """Writes a safetensors file with any header: its length, the header, the data."""
    text = json.dumps(header).encode()
    (path / SINGLE_FILE).write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize("max_shard_size", ["5GB", "60KB"])
def test_single_files_and_shards_load_alike(llama_checkpoint: Callable[..., Path], max_shard_size: str) -> None:
    path = llama_checkpoint(max_shard_size=max_shard_size)
    assert (path / INDEX_FILE).exists() == (max_shard_size == "60KB")
    expected = {name: x for file in path.glob("*.safetensors") for name, x in load_file(file).items()}
    loaded = load(path, *whole_model(spec(path)))
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_a_rank_gets_its_slices_and_their_bytes(llama_checkpoint: Callable[..., Path]) -> None:
    path = llama_checkpoint()
    model = spec(path)
    part = Part(layers=Span(0, 1), kv_heads=Span(1, 2), ffn_columns=Span(30, 96), vocab_rows=Span(5, 9))
    slices = shard_tensors(model, part)
    stored = load_file(path / SINGLE_FILE)
    reported: list[tuple[int, int]] = []
    loaded = load_weights(path, slices, torch.float32, CPU, lambda *counts: reported.append(counts))
    for slice_ in slices:
        expected = stored[slice_.name][tuple(slice(span.start, span.stop) for span in slice_.spans)]
        assert torch.equal(loaded[slice_.name], expected)
        # No view of the file or of a larger tensor, which would keep both alive.
        assert loaded[slice_.name].untyped_storage().nbytes() == expected.nbytes
    total = sum(x.nbytes for x in loaded.values())
    assert [count for count, _ in reported] == sorted({count for count, _ in reported})
    assert (reported[0], reported[-1]) == ((0, total), (total, total)), "what is to come is known from the beginning"
    assert {count for _, count in reported} == {total}


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_float_types_are_converted(tmp_path: Path, stored: torch.dtype, wanted: torch.dtype) -> None:
    tensor = torch.randn(4, 6).to(stored)
    save_file({NAME: tensor}, tmp_path / SINGLE_FILE)
    loaded = load(tmp_path, WHOLE, dtype=wanted)[NAME]
    assert loaded.dtype == wanted
    assert torch.equal(loaded, tensor.to(wanted))


def test_weights_outlive_their_file(tmp_path: Path) -> None:
    tensor = torch.randn(4, 6)
    save_file({NAME: tensor}, tmp_path / SINGLE_FILE)
    loaded = load(tmp_path, WHOLE)[NAME]
    with (tmp_path / SINGLE_FILE).open("r+b") as file:
        file.truncate(0)
    assert torch.equal(loaded, tensor)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth"])
def test_pickled_weights_are_refused_with_the_way_out(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")
    error = refusal(tmp_path)
    assert error.field == "model.path"
    assert "pickle" in error.problem and name in error.problem
    assert "safetensors" in error.fix


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path).problem == f"{tmp_path} has no {SINGLE_FILE} (it is empty)"
    assert refusal(tmp_path / "nowhere").problem == f"{tmp_path}/nowhere is no directory of this machine"


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    save_file({"other": torch.zeros(1)}, tmp_path / SINGLE_FILE)
    assert refusal(tmp_path).field == f"{SINGLE_FILE}: {NAME}"


def test_a_wrong_shape_is_named(tmp_path: Path) -> None:
    save_file({NAME: torch.zeros(6, 4)}, tmp_path / SINGLE_FILE)
    assert refusal(tmp_path).value == (6, 4)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.float8_e4m3fn])
def test_other_number_types_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({NAME: torch.zeros(4, 6).to(dtype)}, tmp_path / SINGLE_FILE)
    assert "number type" in refusal(tmp_path).problem


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 7,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 100) + b"{}",
        struct.pack("<Q", 4) + b"nope",
        struct.pack("<Q", 2) + b"[]",
    ],
)
def test_a_corrupt_header_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / SINGLE_FILE).write_bytes(content)
    assert refusal(tmp_path).field == SINGLE_FILE


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [4, 6], "data_offsets": [0, 95]},
        {"dtype": "F32", "shape": [4, 6], "data_offsets": [0, 960]},
        {"dtype": "F32", "shape": [4, 6], "data_offsets": [96, 0]},
        {"dtype": "F32", "shape": [2**62, 6], "data_offsets": [0, 96]},
        {"dtype": "F32", "shape": [-4, 6], "data_offsets": [0, 96]},
        {"dtype": "F33", "shape": [4, 6], "data_offsets": [0, 96]},
    ],
)
def test_a_crafted_entry_is_refused(tmp_path: Path, entry: dict[str, Any]) -> None:
    write_raw(tmp_path, {NAME: entry}, bytes(96))
    refusal(tmp_path)


def test_overlapping_tensors_are_refused(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [4, 6], "data_offsets": [0, 96]}
    write_raw(tmp_path, {NAME: entry, "second": entry}, bytes(96))
    refusal(tmp_path)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    save_file({NAME: torch.zeros(4, 6)}, tmp_path / SINGLE_FILE)
    content = (tmp_path / SINGLE_FILE).read_bytes()
    (tmp_path / SINGLE_FILE).write_bytes(content[:-1])
    refusal(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "/etc/secret.safetensors",
        "sub/x.safetensors",
        "..\\x.safetensors",
        "x\0.safetensors",
        ".",
    ],
)
def test_an_index_cannot_lead_out_of_the_directory(tmp_path: Path, name: str) -> None:
    inside = tmp_path / "model"
    inside.mkdir()
    save_file({NAME: torch.zeros(4, 6)}, tmp_path / "secret.safetensors")
    write_index(inside, {"weight_map": {NAME: name}})
    error = refusal(inside)
    assert (error.field, error.value) == (INDEX_FILE, name)
    assert error.problem == "names a file that is not right in the model directory"


@pytest.mark.parametrize("name", [7, None])
def test_an_index_names_files_by_text(tmp_path: Path, name: object) -> None:
    save_file({NAME: torch.zeros(4, 6)}, tmp_path / "a.safetensors")
    write_index(tmp_path, {"weight_map": {NAME: name}})
    error = refusal(tmp_path)
    assert (error.field, error.value) == (f"{INDEX_FILE}: weight_map", {NAME: name})


@pytest.mark.parametrize("name", ["a.bin", "", ".."])
def test_an_index_of_other_files_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.bin").write_bytes(b"\x80\x04.")
    write_index(tmp_path, {"weight_map": {NAME: name}})
    error = refusal(tmp_path)
    assert (error.value, error.problem) == (name, "names a file of another kind")
    assert "safetensors" in error.fix


def test_an_index_that_names_a_missing_file_is_refused(tmp_path: Path) -> None:
    write_index(tmp_path, {"weight_map": {NAME: "a.safetensors"}})
    assert refusal(tmp_path).problem == f"{tmp_path} has no a.safetensors"


def test_an_index_without_the_tensor_is_refused(tmp_path: Path) -> None:
    write_index(tmp_path, {"weight_map": {}})
    assert refusal(tmp_path).problem == f"lacks the tensor {NAME}"


@pytest.mark.parametrize("content", ["{", "[]", "3", "[" * 100_000, "\xff"])
def test_a_corrupt_index_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / INDEX_FILE).write_bytes(content.encode("latin-1"))
    assert refusal(tmp_path).field == INDEX_FILE


@pytest.mark.parametrize("content", ['{"weight_map": []}', "{}"])
def test_an_index_without_a_map_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / INDEX_FILE).write_text(content)
    assert refusal(tmp_path).field == f"{INDEX_FILE}: weight_map"


def test_a_huge_index_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / INDEX_FILE).open("wb") as file:
        file.truncate(MAX_INDEX_BYTES + 1)
    assert refusal(tmp_path).problem.startswith(f"has {MAX_INDEX_BYTES + 1} bytes")


def test_a_link_out_of_the_directory_is_refused(tmp_path: Path) -> None:
    inside = tmp_path / "model"
    inside.mkdir()
    save_file({WHOLE.name: torch.zeros(WHOLE.shape)}, tmp_path / "elsewhere.safetensors")
    (inside / SINGLE_FILE).symlink_to(tmp_path / "elsewhere.safetensors")
    error = refusal(inside)
    assert (error.field, error.problem) == (SINGLE_FILE, "is a link that leads out of the model directory")


def test_an_index_that_is_a_link_out_of_the_directory_is_refused(tmp_path: Path) -> None:
    inside = tmp_path / "model"
    inside.mkdir()
    write_index(tmp_path, {"weight_map": {}})
    (inside / INDEX_FILE).symlink_to(tmp_path / INDEX_FILE)
    error = refusal(inside)
    assert (error.field, error.problem) == (INDEX_FILE, "is a link that leads out of the model directory")


def test_a_snapshot_of_the_cache_is_read_through_its_links(llama_checkpoint: Callable[..., Path]) -> None:
    path = hub_snapshot(llama_checkpoint(max_shard_size="60KB"))
    names = whole_model(spec(path))
    assert load(path, *names).keys() == {slice_.name for slice_ in names}
    (path.parents[1] / "blobs").rename(path.parents[1] / "moved")
    (path.parents[1] / "blobs").symlink_to("moved")
    assert refusal(path, *names).problem == "is a link that leads out of the model directory"


def test_a_pointer_of_git_lfs_is_called_one(tmp_path: Path) -> None:
    (tmp_path / SINGLE_FILE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0a\nsize 12345\n")
    error = refusal(tmp_path)
    assert error.field == SINGLE_FILE and "Git LFS" in error.problem
