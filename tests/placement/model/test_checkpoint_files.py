"""Checks what the index of a checkpoint may say, and how files that cannot be used are refused."""

import json
from pathlib import PurePosixPath

import pytest

from placement.errors import InvalidModel
from placement.model.checkpoint_files import (
    FIX_AGAIN,
    INDEX_FILE,
    is_allowed,
    is_lfs_pointer,
    leads_outside,
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
    assert (error.field, error.value, error.fix) == ("config.json", None, FIX_AGAIN)
    assert error.problem.startswith(problem)


def test_refusals_name_the_file_and_no_number_that_is_not_a_users() -> None:
    assert str(leads_outside("a.safetensors")).startswith("a.safetensors: is a link that leads out of the model")
    error = too_large("config.json", 9, limit_bytes=8)
    assert (error.field, error.value) == ("config.json", None)
    assert error.problem == "has 9 bytes, which is more than the 8 that are read"


HUB = "/cache/hub/models--some--model"
SNAPSHOT = f"{HUB}/snapshots/0123"


@pytest.mark.parametrize(
    ("directory", "file", "allowed"),
    [
        ("/models/x", "/models/x/config.json", True),
        ("/models/x", "/models/xy/config.json", False),
        ("/models/x", "/models/blobs/0a", False),
        (SNAPSHOT, f"{SNAPSHOT}/config.json", True),
        (SNAPSHOT, f"{HUB}/blobs/0a", True),
        (f"{SNAPSHOT}/text", f"{HUB}/blobs/0a", True),
        (SNAPSHOT, f"{HUB}/blobs/sub/0a", False),
        (SNAPSHOT, f"{HUB}/blobs", False),
        (SNAPSHOT, f"{HUB}/snapshots/4567/config.json", False),
        (SNAPSHOT, "/cache/hub/models--other--model/blobs/0a", False),
        (SNAPSHOT, "/etc/hostname", False),
        (f"{HUB}/other/0123", f"{HUB}/blobs/0a", False),
        (f"{HUB}/snapshots", f"{HUB}/blobs/0a", False),
        ("/cache/hub/model/snapshots/0123", "/cache/hub/model/blobs/0a", False),
    ],
)
def test_files_are_the_directorys_own_or_the_blobs_of_its_repository(directory: str, file: str, allowed: bool) -> None:
    assert is_allowed(PurePosixPath(directory), PurePosixPath(file)) == allowed


def test_a_pointer_of_git_lfs_is_called_one() -> None:
    data = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    assert is_lfs_pointer(data) and not is_lfs_pointer(b"{}")
    with pytest.raises(InvalidModel, match=r"tokenizer.json: is a pointer of Git LFS.*git lfs pull"):
        parse_object("tokenizer.json", data)
