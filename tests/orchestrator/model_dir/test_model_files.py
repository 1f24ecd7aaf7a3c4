"""Where a model's chat template is found, and which of its files are refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.model_dir.chat import Message
from orchestrator.model_dir.files import MAX_TEMPLATE_BYTES, read_model_files
from placement.errors import InvalidModel

HELLO = [Message(role="user", content="hello")]


@pytest.fixture
def model(served_checkpoint: Path, tmp_path: Path) -> Path:
    """A sound model directory without a template."""
    for file in served_checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def rendered(model: Path) -> str:
    template = read_model_files(model).chat_template
    assert template is not None
    return template.render(HELLO, add_generation_prompt=True)


def configure(model: Path, **values: Any) -> None:
    (model / "tokenizer_config.json").write_text(json.dumps(values))


def refused(model: Path) -> InvalidModel:
    with pytest.raises(InvalidModel) as caught:
        read_model_files(model)
    return caught.value


def test_a_base_model_has_no_template(model: Path) -> None:
    assert read_model_files(model).chat_template is None
    configure(model, bos_token="<|b|>")
    assert read_model_files(model).chat_template is None


def test_the_file_of_its_own_wins_over_the_tokenizers_configuration(model: Path) -> None:
    configure(model, chat_template="{{ bos_token }}inside: {{ messages[0].content }}", bos_token="<|b|>")
    assert rendered(model) == "<|b|>inside: hello"
    (model / "chat_template.jinja").write_text("{{ bos_token }}é beside: {{ messages[0].content }}\n")
    assert rendered(model) == "<|b|>é beside: hello"


def test_special_tokens_of_older_models_are_found(model: Path) -> None:
    (model / "chat_template.jinja").write_text("{{ messages[0].content }}{{ eos_token }}")
    (model / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|e|>"}}')
    assert rendered(model) == "hello<|e|>"


def test_a_template_with_a_mistake_is_refused_before_anything_starts(model: Path) -> None:
    (model / "chat_template.jinja").write_text("{% for %}")
    error = refused(model)
    assert (error.field, error.value) == ("chat_template.jinja", None)
    assert error.fix == "Use the chat template that was saved with the model."
    (model / "chat_template.jinja").unlink()
    configure(model, chat_template="{% endif %}")
    assert refused(model).field == "tokenizer_config.json: chat_template"


def test_a_template_that_is_no_text_is_refused(model: Path) -> None:
    (model / "chat_template.jinja").write_bytes(b"\xff\xfe{{ 1 }}")
    error = refused(model)
    assert error.field == "chat_template.jinja" and error.problem.startswith("is not UTF-8: ")


def test_a_huge_template_is_not_read(model: Path) -> None:
    (model / "chat_template.jinja").write_bytes(b" " * (MAX_TEMPLATE_BYTES + 1))
    error = refused(model)
    assert error.field == "chat_template.jinja"
    assert error.problem.startswith(f"has {MAX_TEMPLATE_BYTES + 1} bytes")


def test_a_template_outside_the_directory_is_refused(model: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside") / "secret"
    outside.write_text("secret")
    (model / "chat_template.jinja").symlink_to(outside)
    assert refused(model).problem == "is a link that leads out of the model directory"


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_damaged_configurations_are_refused(model: Path, name: str) -> None:
    (model / name).write_text("{")
    error = refused(model)
    assert error.field == name and error.problem.startswith("is not valid JSON: ")
