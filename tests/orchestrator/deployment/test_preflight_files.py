"""What is refused of a model directory before any process starts, and what the refusal says."""

import json
import struct
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from orchestrator.controller.settings import DeploymentSettings
from orchestrator.deployment.plan_lines import warning_events
from orchestrator.model_dir.files import read_model_files
from placement.errors import InvalidModel
from placement.model.hf import read_model_spec
from placement.model.weights import whole_model
from protos.heterodyne.worker.v1 import worker_pb2 as pb
from tests.support.deploying.deployment import settings_of
from tests.support.deploying.preflight import CONFIG, check, make_model, refused, tensors
from tests.support.hub import hub_snapshot

AGAIN = "Download or export the model again."


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path)


def test_single_file_wins_over_an_index_as_it_does_for_the_workers(model: Path) -> None:
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"x": "gone.safetensors"}}')
    assert check(model).checkpoint_bytes == (model / "model.safetensors").stat().st_size


def test_bfloat16_shards_with_an_index_are_read(model: Path) -> None:
    names = list(tensors())
    write_raw(model / "a.safetensors", {name: ("BF16", shape_of(name)) for name in names[:5]})
    write_raw(model / "b.safetensors", {name: ("BF16", shape_of(name)) for name in names[5:]})
    (model / "model.safetensors").unlink()
    owners = {name: "a.safetensors" if name in names[:5] else "b.safetensors" for name in names}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": owners}))
    sizes = [(model / name).stat().st_size for name in ("a.safetensors", "b.safetensors")]
    assert read_model_files(model).checkpoint_bytes == sum(sizes)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_missing_file_is_named(model: Path, name: str) -> None:
    (model / name).unlink()
    error = refused(InvalidModel, lambda: check(model))
    assert (error.field, error.value, error.fix) == ("model.path", None, AGAIN)
    assert error.problem.startswith(f"{model} has no {name}")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json"])
@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "is not valid JSON: "),
        ("[]", "is not a JSON object"),
        ("[" * 100_000, "is not valid JSON: "),
        ("\udcff", "is not valid JSON: "),
    ],
)
def test_damaged_json_is_refused(model: Path, name: str, text: str, problem: str) -> None:
    (model / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    error = refused(InvalidModel, lambda: check(model))
    assert (error.field, error.fix) == (name, AGAIN)
    assert error.problem.startswith(problem)


def test_huge_json_is_not_read(model: Path) -> None:
    (model / "config.json").write_bytes(b" " * (2**20 + 1))
    error = refused(InvalidModel, lambda: check(model))
    problem = "has 1048577 bytes, which is more than the 1048576 that are read"
    assert (error.field, error.value, error.problem) == ("config.json", None, problem)


def test_symlink_out_of_the_directory_is_refused(model: Path) -> None:
    (model / "model.safetensors").rename(model.parent / "elsewhere.safetensors")
    (model / "model.safetensors").symlink_to(model.parent / "elsewhere.safetensors")
    error = refused(InvalidModel, lambda: check(model))
    assert (error.field, error.value) == ("model.safetensors", None)
    assert error.problem == "is a link that leads out of the model directory"
    assert error.fix == "Put the file itself there, as `hf download MODEL --local-dir DIRECTORY` does."


def test_symlink_of_an_index_out_of_the_directory_is_refused(model: Path) -> None:
    (model / "model.safetensors").rename(model.parent / "elsewhere.safetensors")
    (model / "part.safetensors").symlink_to(model.parent / "elsewhere.safetensors")
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"x": "part.safetensors"}}')
    error = refused(InvalidModel, lambda: check(model))
    assert (error.field, error.problem) == ("part.safetensors", "is a link that leads out of the model directory")


def test_a_head_of_its_own_is_planned_for_and_told_to_ranks(model: Path) -> None:
    """Whether there is one is said by config.json and by the files, which workers are not to compare again."""
    (model / "config.json").write_text(json.dumps(CONFIG | {"tie_word_embeddings": True}))
    head = tensors()["lm_head.weight"]
    for weight, is_tied in ((head, True), (head + 1, False)):
        save_file(tensors(**{"lm_head.weight": weight}), model / "model.safetensors")
        checked = check(model)
        (shard,) = checked.plan.replicas[0].stages[0].shards
        assert checked.model.tied_embeddings == is_tied
        assert shard.weight_bytes == 2 * (checked.num_parameters + is_tied * head.size)  # packed beside the embedding
        assert len(checked.warnings) == (not is_tied)
        settings = DeploymentSettings(plan=checked.plan, model_path=str(model), load_timeout_s=1.0)
        facts = settings.load_request("replica-0", shard, epoch=1).facts
        assert (facts.tied_embeddings, list(facts.eos_token_ids)) == (is_tied, [])
        assert [said.event for said in warning_events(checked)] == ["warning"] * (not is_tied)


def test_ranks_are_told_the_tokenizers_own_end(model: Path) -> None:
    (model / "config.json").write_text(json.dumps(CONFIG | {"eos_token_id": 3}))
    (model / "tokenizer_config.json").write_text('{"eos_token": "b"}')
    checked = check(model)
    settings = DeploymentSettings(plan=checked.plan, model_path=str(model), load_timeout_s=1.0)
    request = settings.load_request("replica-0", checked.plan.replicas[0].leader, epoch=1)
    assert list(request.facts.eos_token_ids) == list(checked.model.eos_token_ids) == [3, 19]


def test_ranks_are_told_what_to_compare_their_own_files_with(model: Path) -> None:
    def told() -> dict[str, bytes]:
        checked = check(model)
        request = settings_of(checked).load_request("replica-0", checked.plan.replicas[0].leader, epoch=1)
        return dict(request.facts.fingerprint)

    first = told()
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= first.keys()
    assert told() == first
    save_file({name: tensor + 1 for name, tensor in tensors().items()}, model / "model.safetensors")
    second = told()
    assert [name for name in first if first[name] != second[name]] == ["model.safetensors"]


def test_tokens_that_the_model_has_no_rows_for_are_warned_of(model: Path) -> None:
    (model / "added_tokens.json").write_text('{"[PAD]": 20}')
    (said,) = warning_events(check(model))
    assert "tokens whose ids are not below vocab_size = 20 are left out: '[PAD]'" in said.sentence


def test_a_template_that_keeps_no_words_is_warned_of(model: Path) -> None:
    (model / "chat_template.jinja").write_text("{% for message in messages %}<{{ message.role }}>{% endfor %}")
    (said,) = warning_events(check(model))
    assert "chat requests will be refused" in said.sentence
    (model / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content[0].text }}{% endfor %}")
    assert check(model).warnings == ()


@pytest.mark.parametrize("absolute", [False, True])
def test_a_snapshot_of_the_cache_is_a_model_directory(model: Path, absolute: bool) -> None:
    snapshot = hub_snapshot(model, absolute=absolute)
    assert check(snapshot).checkpoint_bytes == (model / "model.safetensors").stat().st_size
    (model.parent / "link").symlink_to(snapshot)
    check(model.parent / "link")
    if not absolute:
        moved = snapshot.parents[2].rename(model.parent / "elsewhere")
        check(moved / snapshot.relative_to(model.parent / "model-cache"))


def test_links_of_a_snapshot_lead_to_its_own_repository_only(model: Path) -> None:
    snapshot, other = hub_snapshot(model), hub_snapshot(model.parent / "model", name="models--other--model")
    for target in (other / "tokenizer.json", model / "tokenizer.json", Path("/etc/hostname")):
        (snapshot / "tokenizer.json").unlink()
        (snapshot / "tokenizer.json").symlink_to(target)
        error = refused(InvalidModel, lambda: check(snapshot))
        assert (error.field, error.problem) == ("tokenizer.json", "is a link that leads out of the model directory")


def test_the_repository_itself_is_told_its_snapshot(model: Path) -> None:
    snapshot = hub_snapshot(model)
    newer = snapshot.parent / ("0" * 40)  # sorts first, and is not what refs/main names
    newer.mkdir()
    (newer / "config.json").symlink_to((snapshot / "config.json").resolve())
    for given in (snapshot.parents[1], snapshot.parent):
        error = refused(InvalidModel, lambda given=given: check(given))
        assert f"{given} " in error.problem and "cache of Hugging Face" in error.problem
    error = refused(InvalidModel, lambda: check(snapshot.parents[1]))
    assert error.fix == f"Give its snapshot: {snapshot}"


def test_what_a_directory_holds_instead_is_said(model: Path) -> None:
    error = refused(InvalidModel, lambda: check(model.parent))
    assert error.problem == f"{model.parent} has no config.json (it holds the model directory model)"
    assert error.fix == f"Give {model}"
    (model / "config.json").unlink()
    (model / "model.safetensors").rename(model / "q4.gguf")
    assert "(it holds GGUF files: q4.gguf)" in refused(InvalidModel, lambda: check(model)).problem


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_pointer_of_git_lfs_is_called_one(model: Path, name: str) -> None:
    (model / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0a\nsize 12345\n")
    error = refused(InvalidModel, lambda: check(model))
    assert error.field == name and error.problem.startswith("is a pointer of Git LFS")
    assert "(got" not in str(error)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a\0b", "sub/x.safetensors", "a\\b"])
def test_index_takes_plain_file_names_only(model: Path, name: str) -> None:
    (model / "sub").mkdir()
    (model / "model.safetensors").rename(model / "sub" / "x.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    error = refused(InvalidModel, lambda: check(model))
    assert (error.field, error.value) == ("model.safetensors.index.json", name)
    assert error.problem == "names a file that is not right in the model directory"


def test_index_of_another_kind_of_file_is_refused(model: Path) -> None:
    (model / "model.safetensors").rename(model / "w.bin")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "w.bin"}}))
    error = refused(InvalidModel, lambda: check(model))
    assert (error.field, error.value) == ("model.safetensors.index.json", "w.bin")
    assert error.fix == "Only safetensors files are loaded; save the model as such."


def test_index_without_a_map_is_refused(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"x": 3}}')
    error = refused(InvalidModel, lambda: check(model))
    assert (error.field, error.value) == ("model.safetensors.index.json: weight_map", {"x": 3})


def test_pickled_weights_are_refused(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    error = refused(InvalidModel, lambda: check(model))
    assert error.problem == (
        f"{model} holds weights as pickles only (pytorch_model.bin), which can run code: none is loaded"
    )
    assert error.fix == ("Save the model as safetensors: model.save_pretrained(path, safe_serialization=True).")


def truncate(data: bytes) -> bytes:
    return data[:-100]


def overlap(data: bytes) -> bytes:
    return raw({"a": ("F32", [4], [0, 16]), "b": ("F32", [4], [8, 24])}, 24)


def overflow(data: bytes) -> bytes:
    return raw({"a": ("F32", [2**62, 4], [0, 16])}, 16)


def negative(data: bytes) -> bytes:
    return raw({"a": ("F32", [-4], [0, 16])}, 16)


def unbounded_header(data: bytes) -> bytes:
    return struct.pack("<Q", 2**62) + data[8:]


def empty(data: bytes) -> bytes:
    return b""


def noise(data: bytes) -> bytes:
    return bytes(range(256))


@pytest.mark.parametrize("damage", [truncate, overlap, overflow, negative, unbounded_header, empty, noise])
def test_damaged_safetensors_file_is_refused(model: Path, damage: Callable[[bytes], bytes]) -> None:
    file = model / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    error = refused(InvalidModel, lambda: check(model))
    assert (error.field, error.value, error.fix) == ("model.safetensors", None, AGAIN)
    assert error.problem.startswith("is damaged or truncated: ")


def test_missing_tensor_is_named(model: Path) -> None:
    weights = tensors()
    del weights["model.norm.weight"]
    save_file(weights, model / "model.safetensors")
    error = refused(InvalidModel, lambda: check(model))
    assert (error.field, error.value, error.problem) == (
        "model.safetensors", None, "lacks the tensor model.norm.weight",
    )  # fmt: skip


def test_tensor_of_another_shape_is_refused(model: Path) -> None:
    save_file(tensors(**{"model.norm.weight": np.zeros(8, np.float32)}), model / "model.safetensors")
    error = refused(InvalidModel, lambda: check(model))
    assert (error.field, error.value) == ("model.safetensors: model.norm.weight", [8])
    assert error.problem == "has another shape than config.json says, which is [16]"
    assert error.fix == "Use the config.json that was saved with these weights."


def test_tensor_of_another_number_type_is_refused(model: Path) -> None:
    save_file(tensors(**{"model.norm.weight": np.zeros(16, np.int8)}), model / "model.safetensors")
    error = refused(InvalidModel, lambda: check(model))
    assert (error.field, error.value) == ("model.safetensors: model.norm.weight", "I8")
    assert error.fix == "Save the model as one of F32, F16, BF16."


@pytest.mark.parametrize(
    ("tokenizer", "value", "problem"),
    [
        (
            {"model": {"vocab": {"a": 20}}},
            20, "has a token id that is not below vocab_size = 20 of config.json",
        ),
        (
            {"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 31}]},
            31, "has a token id that is not below vocab_size = 20 of config.json",
        ),
        (
            {"model": {"vocab": [["a", 0.0]] * 21}},
            20, "has a token id that is not below vocab_size = 20 of config.json",
        ),
        ({"model": {"vocab": {"a": "0"}}}, None, "has a token whose id is not a number"),
        ({"model": None}, None, "has no model.vocab"),
    ],
)  # fmt: skip
def test_tokenizer_that_does_not_fit_the_model_is_refused(
    model: Path, tokenizer: object, value: object, problem: str
) -> None:
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    error = refused(InvalidModel, lambda: check(model))
    assert (error.field, error.value, error.problem) == ("tokenizer.json", value, problem)


def test_tokenizer_that_the_library_cannot_read_is_refused(model: Path) -> None:
    (model / "tokenizer.json").write_text(json.dumps({"model": {"type": "Nothing", "vocab": {"a": 0}}}))
    error = refused(InvalidModel, lambda: check(model))
    assert error.field == "tokenizer.json"
    assert error.problem.startswith("cannot be read as a tokenizer: ")
    assert error.fix == "Save the tokenizer again as a fast one: tokenizer.save_pretrained(path)."


def test_headers_of_a_large_checkpoint_are_read_in_well_under_a_second(model: Path) -> None:
    config = CONFIG | {"num_hidden_layers": 126, "hidden_size": 16384, "intermediate_size": 53248}
    config |= {"num_attention_heads": 128, "num_key_value_heads": 8, "vocab_size": 128256}
    (model / "config.json").write_text(json.dumps(config))
    wanted = {item.name: ("BF16", item.shape) for item in whole_model(read_model_spec(config))}
    write_raw(model / "model.safetensors", wanted)  # sparse: 756 GiB that take no room
    started = time.process_time()
    assert read_model_files(model).checkpoint_bytes > 7 * 10**11
    assert time.process_time() - started < 1.0


def shape_of(name: str) -> tuple[int, ...]:
    return next(item.shape for item in whole_model(read_model_spec(CONFIG)) if item.name == name)


def raw(entries: dict[str, tuple[str, list[int], list[int]]], num_bytes: int) -> bytes:
    header = {
        name: {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        for name, (dtype, shape, offsets) in entries.items()
    }
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(num_bytes)


def write_raw(file: Path, entries: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    """A safetensors file of 2-byte elements, its data a hole."""
    offset, placed = 0, {}
    for name, (dtype, shape) in entries.items():
        stop = offset + 2 * int(np.prod(shape, dtype=np.int64))
        placed[name] = (dtype, list(shape), [offset, stop])
        offset = stop
    header = raw(placed, 0)
    with file.open("wb") as out:
        out.write(header)
        out.truncate(len(header) + offset)


def test_ranks_are_told_the_sizes_of_their_own_replica_and_how_keys_and_values_come(model: Path) -> None:
    pools = {
        "prefill": {"workers": ["worker-0"], "dtype": "float32", "block_size": 32},
        "decode": {"workers": ["worker-1"]},
    }
    for kv_transfer, expected in (("model", pb.KV_FORMAT_NATIVE), ("int8", pb.KV_FORMAT_INT8)):
        serving = {"pools": pools, "kv_transfer": kv_transfer}
        checked = check(model, cluster={"workers": [{"count": 2}]}, serving=serving)
        settings = settings_of(checked)
        loads = [settings.load_request(each.name, each.leader, epoch=1) for each in checked.plan.replicas]
        speeds = [settings.speed_request(each.name, epoch=1) for each in checked.plan.replicas]
        assert [request.block_size for request in loads] == [32, 16]
        assert [request.dtype for request in loads] == [pb.DTYPE_FLOAT32, pb.DTYPE_BFLOAT16]
        assert [request.dtype for request in speeds] == [pb.DTYPE_FLOAT32, pb.DTYPE_BFLOAT16]
        assert {request.kv_format for request in loads} == {expected}
        assert len({request.max_context_tokens for request in loads}) == 1
