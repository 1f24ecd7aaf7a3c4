"""Chat templates against transformers' apply_chat_template, and what a template may not do."""

import json
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from orchestrator.model_dir.chat import ChatTemplate, Message, template_source
from orchestrator.model_dir.chat_sandbox import MAX_PROMPT_CHARACTERS, MAX_RENDER_S
from placement.errors import InvalidModel, InvalidRequest
from placement.model.special_tokens import TokenFiles, special_texts
from tests.support.clocks import PATIENCE_S
from tests.support.gateway.chat_templates import ALL, INSTRUCT
from tests.support.tokenizer import save_tokenizer

TOKENS = {"bos_token": "<|b|>", "eos_token": "<|e|>", "pad_token": "<|pad|>"}
CONVERSATIONS = {
    "one": [("user", "In the beginning")],
    "system": [("system", "  So be it. "), ("user", "And the\nspirit?\n")],
    "turns": [
        ("system", "Be brief."),
        ("user", "Who moved?"),
        ("assistant", "<think>\nthe waters\n</think>\n\nThe spirit. "),
        ("user", "{{ upon }} {% what %} <|e|>"),
    ],
    "marks": [("user", "<b>&amp;'\"é 水 \U0001f600</b>")],
    "ends with the assistant": [("user", "a"), ("assistant", "<think>b</think>c"), ("user", "d"), ("assistant", "e")],
}


@pytest.fixture(scope="module", autouse=True)
def patience() -> Iterator[None]:
    """Renders are not stopped because the machine is busy; a test of the limit sets it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("orchestrator.model_dir.chat.MAX_RENDER_S", PATIENCE_S)
        yield


def messages(turns: list[tuple[str, str]]) -> list[Message]:
    return [Message(role=role, content=content) for role, content in turns]


def render(source: str, *turns: tuple[str, str], **options: Any) -> str:
    template = ChatTemplate(source, special_tokens=TOKENS, **options)
    return template.render(messages(list(turns or [("user", "hello")])), add_generation_prompt=True)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer whose post-processor adds the first token, as Llama's does."""
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer = save_tokenizer(path)
    tokenizer.post_processor = processors.TemplateProcessing(single="<|b|> $A", special_tokens=[("<|b|>", 1)])
    tokenizer.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def oracle(directory: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"), **TOKENS)


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("turns", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("source", ALL.values(), ids=ALL)
def test_text_and_tokens_are_those_of_transformers(
    oracle: PreTrainedTokenizerFast, directory: Path, source: str, turns: list[tuple[str, str]], prompt: bool
) -> None:
    dicts = [{"role": role, "content": content} for role, content in turns]
    template = ChatTemplate(source, special_tokens=TOKENS)
    text = template.render(messages(turns), add_generation_prompt=prompt)
    options: dict[str, Any] = {"chat_template": source, "add_generation_prompt": prompt}
    assert text == oracle.apply_chat_template(dicts, tokenize=False, **options)
    ids = Tokenizer.from_file(str(directory / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    assert ids == oracle.apply_chat_template(dicts, tokenize=True, return_dict=False, **options)
    if "bos_token" in source:
        assert ids.count(1) == 1, "the post-processor's first token is not added to the template's"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["system", "user", "assistant", "tool"]), st.text()), min_size=1, max_size=6))
def test_any_conversation_is_written_as_by_transformers_or_refused_as_by_it(
    oracle: PreTrainedTokenizerFast, turns: list[tuple[str, str]]
) -> None:
    dicts = [{"role": role, "content": content} for role, content in turns]
    for source in ALL.values():
        template = ChatTemplate(source, special_tokens=TOKENS)
        try:
            expected = oracle.apply_chat_template(dicts, chat_template=source, tokenize=False)
        except Exception as error:
            with pytest.raises(InvalidRequest) as caught:
                template.render(messages(turns), add_generation_prompt=False)
            assert " ".join(str(error).split()) in str(caught.value)
        else:
            assert template.render(messages(turns), add_generation_prompt=False) == expected


def test_the_templates_own_refusal_reaches_the_client() -> None:
    with pytest.raises(InvalidRequest) as caught:
        render(INSTRUCT, ("user", "a"), ("user", "b"))
    error = caught.value
    assert (error.field, error.value) == ("chat", "2 messages")
    assert error.problem == (
        "cannot be written as a prompt by the model's chat template: After the optional system message, "
        "roles must alternate user/assistant/..."
    )


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ messages[7].content }}", "list object has no element 7"),
        ("{{ messages[0].content.nothing.at.all }}", "has no attribute 'nothing'"),
        ("{{ undefined_function() }}", "'undefined_function' is undefined"),
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        ("{{ messages.append(1) }}", "access to attribute 'append' of 'list' object is unsafe"),
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__' of 'str' object is unsafe"),
        ("{{ ''['__class__'] }}{{ ''|attr('__class__')() }}", "unsafe"),
        ("{{ raise_exception.__globals__.x }}", "unsafe"),
        ("{{ '{0.__class__.__init__.__globals__}'.format(dict) }}", "unsafe"),
        ("{{ namespace(__init__=1) }}", "a namespace cannot have the attribute '__init__'"),
        ("{% set n = namespace() %}{% set n.__class__ = 1 %}", "a namespace cannot have the attribute '__class__'"),
        ("{% include 'other' %}", "no loader"),
        ("{{ range(100001)|list }}", "Range too big"),
        ("{{ 'a' * 999999999999 }}", f"it writes more than {MAX_PROMPT_CHARACTERS} characters"),
        ("{{ [0] * 999999999999 }}", f"it writes more than {MAX_PROMPT_CHARACTERS} characters"),
        ("{{ 9 ** 9 ** 9 }}{{ 2 ** 99999 }}", "it computes too large a number"),
        (
            "{% set n = namespace(x='aaaa') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
            f"it writes more than {MAX_PROMPT_CHARACTERS} characters",
        ),
        (
            "{% set n = namespace(x='aaaa') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
            f"it writes more than {MAX_PROMPT_CHARACTERS} characters",
        ),
        (
            "{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}",
            f"it writes more than {MAX_PROMPT_CHARACTERS} characters",
        ),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    ],
)  # fmt: skip
def test_what_a_template_must_not_do_is_refused_with_its_reason(source: str, reason: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        render(source)
    assert caught.value.field == "chat"
    assert reason in caught.value.problem


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in messages %}{% for b in messages %}{% for c in messages %}{% endfor %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
    ],
)
def test_a_template_that_takes_too_long_is_stopped(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.model_dir.chat.MAX_RENDER_S", MAX_RENDER_S)
    template = ChatTemplate(source, special_tokens={})
    with pytest.raises(InvalidRequest, match="it takes longer than 1 s"):  # each would take longer than a test may
        template.render([Message(role="user", content="")] * 3000, add_generation_prompt=True)


def test_a_long_reason_is_cut() -> None:
    with pytest.raises(InvalidRequest) as caught:
        render("{{ raise_exception(messages[0].content * 1000) }}")
    assert len(str(caught.value)) < 1000


def test_the_deadline_is_out_of_a_templates_reach() -> None:
    assert render("{% set deadline = 1 %}{{ deadline }}{{ self is defined }}") == "1True"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% for %}", "line 1: Expected an expression, got 'end of statement block'"),
        ("\n{{ messages|unheard_of }}", "line 2: No filter named 'unheard_of'."),
        ("{% if a %}", "line 1: Unexpected end of template."),
        ("{% for x in y %}" * 30 + "{% endfor %}" * 30, "SyntaxError: too many statically nested blocks"),
    ],
)
def test_what_is_no_template_is_refused_when_it_is_read(source: str, reason: str) -> None:
    with pytest.raises(InvalidModel) as caught:
        ChatTemplate(source, special_tokens={}, field="tokenizer_config.json: chat_template")
    assert caught.value.field == "tokenizer_config.json: chat_template"
    assert reason in caught.value.problem


def test_compiling_computes_nothing() -> None:
    # Either would take more memory, or time, than there is.
    ChatTemplate("{{ 'a'|center(99999999999) }}{{ 9 ** 9 ** 9 }}", special_tokens={})


def test_dates_are_those_of_the_clock() -> None:
    text = render("{{ strftime_now('%d %b %Y') }}", now=lambda: datetime(2024, 7, 26))
    assert text == "26 Jul 2024"


def test_special_tokens_that_are_not_known_are_written_as_nothing() -> None:
    template = ChatTemplate("[{{ bos_token }}{{ eos_token }}{{ sep_token }}]", special_tokens={"eos_token": "</s>"})
    assert template.render([], add_generation_prompt=False) == "[</s>]"


SPECIAL: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"bos_token": "<|b|>", "eos_token": {"content": "<|e|>", "lstrip": False, "__type": "AddedToken"}}, {}),
    ({"bos_token": None, "add_bos_token": True, "eos_token": "<|e|>"}, {}),
    ({"eos_token": "<|e|>", "added_tokens_decoder": {}}, {"eos_token": "<|pad|>", "bos_token": "<|b|>"}),
    ({"eos_token": "<|e|>"}, {"eos_token": "<|pad|>", "bos_token": {"content": "<|b|>", "lstrip": False}}),
    ({"image_token": "<|pad|>", "extra_special_tokens": {"boi_token": "<|b|>", "eoi_token": "<|e|>"}}, {}),
]


@pytest.mark.parametrize(("config", "special_map"), SPECIAL)
def test_special_tokens_are_those_that_transformers_finds(
    tmp_path: Path, config: dict[str, Any], special_map: dict[str, Any]
) -> None:
    save_tokenizer(tmp_path)
    config = config | {"tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    if special_map:
        (tmp_path / "special_tokens_map.json").write_text(json.dumps(special_map))
    expected = PreTrainedTokenizerFast.from_pretrained(tmp_path).special_tokens_map
    assert special_texts(TokenFiles(config=config, special_tokens_map=special_map)) == expected


def test_of_several_templates_the_default_is_taken() -> None:
    several = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    assert template_source({"chat_template": several}) == "D"
    assert template_source({"chat_template": "only"}) == "only"
    assert template_source({"chat_template": None}) is template_source({}) is None


@pytest.mark.parametrize("value", [7, {"default": "D"}, [{"name": "tool_use", "template": "T"}], [{"name": "default"}]])
def test_templates_in_another_form_are_refused(value: object) -> None:
    with pytest.raises(InvalidModel) as caught:
        template_source({"chat_template": value})
    assert caught.value.field == "tokenizer_config.json: chat_template"


def test_the_time_of_a_render_counts_from_before_its_values_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(list[Message]):
        def __iter__(self) -> Iterator[Message]:
            time.sleep(0.1)
            return super().__iter__()

    monkeypatch.setattr("orchestrator.model_dir.chat.MAX_RENDER_S", 0.05)
    template = ChatTemplate("{% for message in messages %}x{% endfor %}", special_tokens={})
    with pytest.raises(InvalidRequest, match="takes longer"):
        template.render(Slow([Message(role="user", content="hi")]), add_generation_prompt=False)
