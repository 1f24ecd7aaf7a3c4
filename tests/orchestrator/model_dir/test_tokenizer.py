"""A model's tokenizer is the one that transformers makes of the same files, whichever of them names a token."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from orchestrator.model_dir.directory import read_tokenizer_of
from placement.errors import InvalidModel
from placement.model.tokenizer_json import CompleteTokenizer
from tests.support.tokenizer import save_tokenizer
from workers.host import model_files

ROWS = 512
START, END = "<|im_start|>", "<|im_end|>"
TEXT = f"{START}God said{END} <|e|>: <|plain|> {START} the  earth"
BASE = {"tokenizer_class": "PreTrainedTokenizerFast"}


def flags(content: str, **changes: bool) -> dict[str, Any]:
    values = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"content": content} | values | changes


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory with a tokenizer, and the id of the next token that is added to it in ``next``."""
    size = save_tokenizer(tmp_path).get_vocab_size()
    values = json.loads((tmp_path / "tokenizer.json").read_text())
    values["added_tokens"].append({"id": size} | flags("<|plain|>", special=False))
    values["truncation"] = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    values["padding"] = {
        "strategy": {"Fixed": 40}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "<|pad|>",
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "next").write_text(str(size + 1))
    return tmp_path


def write(model: Path, **files: object) -> int:
    """Writes JSON files; returns the next free id of the tokenizer."""
    for name, values in files.items():
        (model / f"{name}.json").write_text(json.dumps(values))
    return int((model / "next").read_text())


def check_against_transformers(model: Path) -> CompleteTokenizer:
    complete = read_tokenizer_of(model, vocab_size=ROWS)
    assert model_files.read_tokenizer_of(model, vocab_size=ROWS) == complete
    ours, oracle = Tokenizer.from_str(complete.text), AutoTokenizer.from_pretrained(model)
    ids = ours.encode(TEXT).ids
    assert ids == oracle(TEXT)["input_ids"]
    assert ours.decode(ids) == oracle.decode(ids, skip_special_tokens=True)
    assert ours.decode(ids, skip_special_tokens=False) == oracle.decode(ids)
    assert complete.eos_token_id == oracle.eos_token_id
    return complete


def test_truncation_and_padding_are_off(model: Path) -> None:
    check_against_transformers(model)
    assert len(Tokenizer.from_file(str(model / "tokenizer.json")).encode(TEXT).ids) == 40


def test_a_post_processor_still_adds_its_tokens(model: Path) -> None:
    values = json.loads((model / "tokenizer.json").read_text())
    begin = [{"SpecialToken": {"id": "<|b|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    special = {"<|b|>": {"id": "<|b|>", "ids": [1], "tokens": ["<|b|>"]}}
    values["post_processor"] = {
        "type": "TemplateProcessing", "single": begin, "pair": begin, "special_tokens": special,
    }  # fmt: skip
    (model / "tokenizer.json").write_text(json.dumps(values))
    text = check_against_transformers(model).text
    assert Tokenizer.from_str(text).encode("God").ids[0] == 1


def test_a_tokenizer_with_nothing_to_change_is_read_as_it_is(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    text = (tmp_path / "tokenizer.json").read_text()
    assert read_tokenizer_of(tmp_path, vocab_size=ROWS).text == text


def listed(first: int, **changes: bool) -> dict[str, Any]:
    """Two tokens as added_tokens_decoder has them, not in the order of their ids."""
    return {str(first + 1): flags(END), str(first): flags(START, **changes)}


@pytest.mark.parametrize(
    "changes", [{}, {"special": False}, {"lstrip": True}, {"rstrip": True, "normalized": True}, {"single_word": True}]
)
def test_tokens_of_the_tokenizers_configuration_are_added_with_their_flags(
    model: Path, changes: dict[str, bool]
) -> None:
    first = write(model)
    write(model, tokenizer_config=BASE | {"added_tokens_decoder": listed(first, **changes), "eos_token": END})
    complete = check_against_transformers(model)
    assert complete.eos_token_id == first + 1


def test_flags_of_the_tokenizers_configuration_win_over_tokenizer_json(model: Path) -> None:
    plain = write(model) - 1
    write(model, tokenizer_config=BASE | {"added_tokens_decoder": {str(plain): flags("<|plain|>", lstrip=True)}})
    check_against_transformers(model)


@pytest.mark.parametrize("special", [{}, {"extra_special_tokens": [START]}, {"eos_token": END, "bos_token": START}])
def test_tokens_of_added_tokens_json_are_added(model: Path, special: dict[str, Any]) -> None:
    first = write(model)
    write(model, tokenizer_config=BASE | special, added_tokens={END: first + 1, START: first})
    check_against_transformers(model)


@pytest.mark.parametrize(
    "special_tokens_map",
    [
        {"eos_token": END},
        {"eos_token": flags(END, lstrip=True), "bos_token": "<|plain|>"},
        {"eos_token": "<|e|>", "additional_special_tokens": [START, END]},
        {"eos_token": "the", "unk_token": START},
    ],
)
def test_tokens_of_special_tokens_map_are_added(model: Path, special_tokens_map: dict[str, Any]) -> None:
    write(model, tokenizer_config=BASE, special_tokens_map=special_tokens_map)
    check_against_transformers(model)


@pytest.mark.parametrize(
    "values",
    [
        {"eos_token": END},
        {"eos_token": {"__type": "AddedToken", **flags(END, rstrip=True)}, "pad_token": "<|plain|>"},
        {"additional_special_tokens": [START, END]},
        {"extra_special_tokens": {"turn": START}, "image_token": END},
        # With this key nothing else counts.
        {"added_tokens_decoder": {}, "eos_token": "<|e|>"},
    ],
)
def test_special_tokens_that_only_the_configuration_names_are_added(model: Path, values: dict[str, Any]) -> None:
    first = write(model)
    write(model, tokenizer_config=BASE | values)
    if "added_tokens_decoder" in values:
        write(model, added_tokens={START: first}, special_tokens_map={"eos_token": END})
    check_against_transformers(model)


def test_a_named_token_that_the_model_has_no_row_for_is_left_out(model: Path) -> None:
    first = write(model, tokenizer_config=BASE | {"pad_token": "[PAD]", "eos_token": "<|e|>"})
    complete = read_tokenizer_of(model, vocab_size=first)
    assert "[PAD]" not in complete.text and complete.eos_token_id == 2


def test_ids_that_end_a_sequence_are_the_models_and_the_tokenizers(model: Path) -> None:
    first = write(model)
    write(model, tokenizer_config=BASE | {"added_tokens_decoder": listed(first), "eos_token": END})
    complete = read_tokenizer_of(model, vocab_size=ROWS)
    assert complete.eos_token_ids((2,)) == (2, first + 1)
    assert complete.eos_token_ids(()) == (first + 1,)
    assert complete.eos_token_ids((first + 1, 2)) == (first + 1, 2)
    assert complete.known([2, first + 1, first + 2, ROWS - 1]) == [2, first + 1]
    write(model, tokenizer_config=BASE | {"eos_token": None})
    assert read_tokenizer_of(model, vocab_size=ROWS).eos_token_ids((2,)) == (2,)


@pytest.mark.parametrize("gap", [1, -2])
@pytest.mark.parametrize("file", ["tokenizer_config", "added_tokens"])
def test_an_id_that_cannot_be_a_tokens_is_refused(model: Path, file: str, gap: int) -> None:
    first = write(model)
    token_id = first + gap
    decoder = BASE | {"added_tokens_decoder": {str(token_id): flags(START)}}
    write(model, **{file: decoder if file == "tokenizer_config" else {START: token_id}})
    with pytest.raises(InvalidModel) as caught:
        read_tokenizer_of(model, vocab_size=ROWS)
    assert caught.value.field.startswith(f"{file}.json")
    problem = f"gives '{START}' the id {token_id}; tokenizer.json lacks it, and the next free id is {first}"
    assert caught.value.problem == problem


@pytest.mark.parametrize("gap", [0, 3])
@pytest.mark.parametrize("file", ["tokenizer_config", "added_tokens"])
def test_a_token_whose_id_is_beyond_the_models_rows_is_left_out(model: Path, file: str, gap: int) -> None:
    """Fine-tunes of Llama 2 have 32000 rows, and ``[PAD]`` with the id 32000."""
    rows = write(model) + gap
    listing = {"added_tokens_decoder": {str(rows): flags("[PAD]")}} if file == "tokenizer_config" else {"[PAD]": rows}
    write(model, tokenizer_config=BASE | {"pad_token": "[PAD]", "eos_token": "<|e|>"})
    write(model, **{file: BASE | {"pad_token": "[PAD]"} | listing if file == "tokenizer_config" else listing})
    complete = read_tokenizer_of(model, vocab_size=rows)
    assert model_files.read_tokenizer_of(model, vocab_size=rows) == complete
    assert "[PAD]" not in complete.text and complete.left_out == ("[PAD]",)
    assert complete.num_ids == write(model)


@pytest.mark.parametrize("beside", [{}, {"added_tokens": True}])
def test_a_token_of_tokenizer_json_beyond_the_models_rows_is_left_out(model: Path, beside: dict[str, bool]) -> None:
    rows = write(model)
    values = json.loads((model / "tokenizer.json").read_text())
    values["added_tokens"].append({"id": rows} | flags("[PAD]"))
    write(model, tokenizer=values, tokenizer_config=BASE | {"pad_token": "[PAD]", "eos_token": "<|e|>"})
    write(model, **{name: {"[PAD]": rows} for name in beside})
    complete = read_tokenizer_of(model, vocab_size=rows)
    assert "[PAD]" not in complete.text and complete.left_out == ("[PAD]",)
    assert complete.num_ids == rows and complete.eos_token_id == 2


@pytest.mark.parametrize("use", ["eos_token", "post_processor"])
def test_a_token_of_tokenizer_json_that_is_needed_must_have_a_row(model: Path, use: str) -> None:
    rows = write(model)
    values = json.loads((model / "tokenizer.json").read_text())
    values["added_tokens"].append({"id": rows} | flags(START))
    if use == "post_processor":
        values[use] = {"type": "BertProcessing", "sep": [START, rows], "cls": ["<|b|>", 1]}
    write(model, tokenizer=values, tokenizer_config=BASE | {"eos_token": START if use == "eos_token" else "<|e|>"})
    with pytest.raises(InvalidModel, match=f"not below vocab_size = {rows} of config.json"):
        read_tokenizer_of(model, vocab_size=rows)


def test_an_end_of_sequence_beyond_the_models_rows_is_refused(model: Path) -> None:
    first = write(model)
    write(model, tokenizer_config=BASE | {"eos_token": START}, added_tokens={START: first})
    with pytest.raises(InvalidModel) as caught:
        read_tokenizer_of(model, vocab_size=first)
    problem = f"gives '{START}', which ends a sequence, the id {first}, which is not below vocab_size = {first}"
    assert (caught.value.field, caught.value.problem) == ("added_tokens.json", problem)


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("tokenizer_config", {"added_tokens_decoder": []}),
        ("tokenizer_config", {"added_tokens_decoder": {"a": {"content": START}}}),
        ("tokenizer_config", {"added_tokens_decoder": {"-1": {"content": START}}}),
        ("tokenizer_config", {"added_tokens_decoder": {"400": START}}),
        ("tokenizer_config", {"added_tokens_decoder": {"4" * 5000: flags(START)}}),
        ("tokenizer_config", {"added_tokens_decoder": {"400": {"content": 7}}}),
        ("added_tokens", {START: "400"}),
        ("added_tokens", {START: True}),
        ("added_tokens", {START: -1}),
    ],
)
def test_what_does_not_list_tokens_is_refused(model: Path, file: str, values: dict[str, Any]) -> None:
    write(model, **{file: values})
    with pytest.raises(InvalidModel, match=f"^{file}.json.*does not list tokens with their ids"):
        read_tokenizer_of(model, vocab_size=ROWS)
