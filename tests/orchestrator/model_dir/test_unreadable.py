"""A model directory, or a file in it, that the system keeps from this user is refused in words, in both rooms."""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from orchestrator.model_dir.files import read_model_files
from placement.errors import InvalidModel
from placement.model.weights import whole_model
from tests.support.deploying.preflight import make_model
from workers.startup.checkpoint import load_weights
from workers.startup.checks import read_model

NOBODY = 65534


@pytest.fixture
def model() -> Iterator[Path]:
    """A model directory that every user may read."""
    with tempfile.TemporaryDirectory() as parent:
        os.chmod(parent, 0o755)
        yield make_model(Path(parent))


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Has this process the rights of a user who owns nothing; root could read whatever it is."""
    if os.geteuid():
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@contextlib.contextmanager
def hidden(path: Path, mode: int) -> Iterator[None]:
    before = path.stat().st_mode
    path.chmod(mode)
    try:
        with as_nobody():
            yield
    finally:
        path.chmod(before)


def load(model: Path) -> object:
    return load_weights(
        model, whole_model(read_model(model)), torch.float32, torch.device("cpu"), lambda done, total: None
    )


@pytest.mark.parametrize("read", [read_model_files, load])
@pytest.mark.parametrize(
    ("name", "mode"),
    [(".", 0), (".", 0o444), ("config.json", 0), ("generation_config.json", 0), ("model.safetensors", 0)],
)
def test_what_this_user_may_not_read_is_named(
    model: Path, read: Callable[[Path], object], name: str, mode: int
) -> None:
    (model / "generation_config.json").write_text("{}")
    with hidden(model / name, mode), pytest.raises(InvalidModel) as caught:
        read(model)
    named = "config.json" if name == "." else name
    assert str(caught.value) == (
        f"model.path: {model / named} cannot be read: permission denied. "
        "Give the user that runs Heterodyne the right to read it, or give another directory."
    )


@pytest.mark.parametrize("read", [read_model_files, load])
def test_a_directory_that_lacks_a_file_and_may_not_be_listed_is_named(
    model: Path, read: Callable[[Path], object]
) -> None:
    (model / "model.safetensors").unlink()
    with hidden(model, 0o333), pytest.raises(InvalidModel) as caught:
        read(model)
    assert caught.value.problem == f"{model} cannot be read: permission denied"


@pytest.mark.parametrize("read", [read_model_files, load])
def test_a_link_to_itself_is_a_file_that_is_not_there(model: Path, read: Callable[[Path], object]) -> None:
    (model / "config.json").unlink()
    (model / "config.json").symlink_to("config.json")
    with pytest.raises(InvalidModel, match=r"has a link in place of config\.json, to a file that is not there"):
        read(model)


def test_a_folder_that_may_not_be_read_is_none_to_propose(model: Path) -> None:
    parent = model.parent
    with hidden(model, 0), pytest.raises(InvalidModel, match=r"has no config\.json\. "):
        read_model_files(parent)
