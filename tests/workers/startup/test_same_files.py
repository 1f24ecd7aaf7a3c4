"""Checks that a worker whose machine has another model than the orchestrator's refuses to load it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from orchestrator.model_dir.fingerprint import read_fingerprint
from placement.errors import InvalidModel
from protos.heterodyne.worker.v1 import worker_pb2 as pb
from tests.support.worker import load_request
from workers.host.device import open_device
from workers.startup import loading
from workers.startup.checks import check_load
from workers.startup.loading import LoadJob

SINGLE = "model.safetensors"


@pytest.fixture
def original(tmp_path: Path, llama_checkpoint: Any) -> Path:
    """The model on the orchestrator's machine."""
    path = Path(shutil.copytree(llama_checkpoint(), tmp_path / "original"))
    (path / "tokenizer.json").write_text("{}")
    return path


@pytest.fixture
def copy(original: Path) -> Path:
    """The worker's own copy of it, which a test may change."""
    return Path(shutil.copytree(original, original.parent / "copy"))


def told(path: Path, original: Path) -> pb.LoadRequest:
    """A load of the worker's ``path``, with what the orchestrator found in the original."""
    return load_request(path, facts=pb.ModelFacts(fingerprint=read_fingerprint(original)))


def other_weights(path: Path) -> None:
    weights = load_file(path / SINGLE)
    save_file({name: weight + 1 for name, weight in weights.items()}, path / SINGLE)


def other_config(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))


def other_tokenizer(path: Path) -> None:
    with (path / "tokenizer.json").open("a") as file:
        file.write("\n")


@pytest.mark.parametrize(
    ("change", "name"),
    [(other_weights, SINGLE), (other_config, "config.json"), (other_tokenizer, "tokenizer.json")],
)
def test_a_machine_with_another_model_is_refused_before_weights_are_read(
    original: Path, copy: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None], name: str
) -> None:
    def load_weights(*_: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(loading, "load_weights", load_weights)
    change(copy)
    with pytest.raises(InvalidModel) as caught:
        LoadJob(request=told(copy, original), device=open_device("cpu", 1)).run()
    assert str(caught.value) == (
        f"model.path: {copy} is not the same as on the machine that serve runs on: {name} differs. "
        "Copy the model there again."
    )


def test_an_equal_copy_is_loaded_and_so_is_any_where_nothing_is_told(original: Path, copy: Path) -> None:
    device = open_device("cpu", 1)
    check_load(told(copy, original), device)
    other_weights(copy)
    other_config(copy)
    check_load(load_request(copy), device)


def test_a_rank_that_does_not_lead_needs_no_tokenizer(original: Path, copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    request = told(copy, original)
    halves = [
        pb.Shard(rank=rank, layers={"start": rank, "stop": rank + 1}, kv_heads={"stop": 2}, ffn_columns={"stop": 96})
        for rank in range(2)
    ]
    halves[0].vocab_rows.stop = 509  # the first stage has the embedding and the head
    request.members.extend(pb.Member(host="127.0.0.1", port=1, shard=half) for half in halves)
    request.token = bytes(32)
    device = open_device("cpu", 1)
    request.shard.CopyFrom(halves[1])
    check_load(request, device)
    request.shard.CopyFrom(halves[0])
    with pytest.raises(InvalidModel, match=r"tokenizer\.json is missing here"):
        check_load(request, device)


def test_a_machine_without_the_model_says_so(original: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match="is no directory of this machine"):
        check_load(told(tmp_path / "gone", original), open_device("cpu", 1))
