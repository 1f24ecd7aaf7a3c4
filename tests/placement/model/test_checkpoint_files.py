"""Checks what the index of a checkpoint may say, and how files that cannot be used are refused."""

import json

import pytest

from placement.errors import InvalidModel
from placement.model.checkpoint_files import (
    FIX_AGAIN,
    INDEX_FILE,
    SINGLE_FILE,
    leads_outside,
    no_weights,
    parse_index,
    parse_object,
    too_large,
)


def index(*names: object) -> bytes:
    return json.dumps({"weight_map": {f"tensor {number}": name for number, name in enumerate(names)}}).encode()


def refused(data: bytes) -> InvalidModel:
    with pytest.raises(InvalidModel) as caught:
        parse_index(data)
    return caught.value


def test_an_index_maps_tensors_to_files() -> None:
    assert parse_index(index("a.safetensors", "b.safetensors")) == {
        "tensor 0": "a.safetensors",
        "tensor 1": "b.safetensors",
    }
    assert parse_index(b'{"metadata": {}, "weight_map": {}}') == {}


@pytest.mark.parametrize(
    "name",
    ["../a.safetensors", "/a.safetensors", "b/a.safetensors", "..\\a.safetensors", "a\0.safetensors", ".", "a/", "./a"],
)
def test_any_name_of_an_index_that_leads_elsewhere_is_refused(name: str) -> None:
    error = refused(index("a.safetensors", name))
    assert (error.field, error.value, error.fix) == (INDEX_FILE, name, FIX_AGAIN)
    assert error.problem == "names a file that is not right in the model directory"


@pytest.mark.parametrize("name", ["a.bin", "", "..", "a.safetensors.bin"])
def test_names_of_other_files_are_refused(name: str) -> None:
    error = refused(index(name))
    assert (error.field, error.value) == (INDEX_FILE, name)
    assert error.problem == "names a file of another kind"
    assert error.fix == "Only safetensors files are loaded; save the model as such."


@pytest.mark.parametrize(
    "weight_map", [None, [], "a.safetensors", {"x": 3}, {"x": None}, {"x": "a.safetensors", "y": []}]
)
def test_an_index_that_maps_nothing_to_files_is_refused(weight_map: object) -> None:
    error = refused(json.dumps({"weight_map": weight_map}).encode())
    assert (error.field, error.value) == (f"{INDEX_FILE}: weight_map", weight_map)
    assert error.problem == "does not map tensors to files"


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"{", "is not valid JSON: "),
        (b"", "is not valid JSON: "),
        (b"[" * 100_000, "is not valid JSON: "),
        (b"\xff", "is not valid JSON: "),
        (b"[]", "is not a JSON object"),
        (b"3", "is not a JSON object"),
    ],
)
def test_what_is_no_json_object_is_refused(data: bytes, problem: str) -> None:
    with pytest.raises(InvalidModel) as caught:
        parse_object("config.json", data)
    error = caught.value
    assert (error.field, error.value, error.fix) == ("config.json", len(data), FIX_AGAIN)
    assert error.problem.startswith(problem)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_a_directory_with_pickles_alone_is_told_the_way_out(name: str) -> None:
    error = no_weights(["config.json", "z.bin", name])
    assert (error.field, error.value) == ("model.path", name)
    assert "pickle" in error.problem and "safetensors" in error.fix


def test_a_directory_without_weights_lacks_the_single_file() -> None:
    error = no_weights(["config.json", "bin"])
    assert (error.field, error.value, error.problem) == ("model.path", SINGLE_FILE, "lacks a file")


def test_refusals_name_the_file() -> None:
    assert leads_outside("a.safetensors").field == "a.safetensors"
    error = too_large("config.json", 9, limit_bytes=8)
    assert (error.field, error.value, error.problem) == ("config.json", 9, "is larger than 8 bytes")
