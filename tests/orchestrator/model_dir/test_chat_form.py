"""Whether a chat template wants texts or parts is found out, so that no message goes missing."""

import pytest

from orchestrator.model_dir.chat import ChatTemplate, Message
from placement.errors import InvalidRequest
from tests.support.gateway.chat_templates import ALL

TURNS = (("user", "What is 2+2?"), ("assistant", "Four."), ("user", "Thanks!"))
SYSTEM = ("system", "Be brief.")
EACH = "{% for m in messages %}<{{ m.role }}>"
END = "{% endfor %}"
LOOP = EACH + "{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}" + END + END
FIRST = EACH + "{{ m.content[0].text | trim }}" + END
MAPPED = EACH + "{{ m.content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join }}" + END
MACRO = (
    "{% macro show(c) %}{% for p in c %}{{ p.text }}{% endfor %}{% endmacro %}" + EACH + "{{ show(m.content) }}" + END
)
NO_TEXT = "{% if messages[0].content is string %}{{ raise_exception('Send parts.') }}{% endif %}" + LOOP
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('No system.') }}{% endif %}" + LOOP
ALTERNATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate.') }}{% endif %}{% endfor %}" + FIRST
)
PLAIN = EACH + "{{ m.content | trim }}" + END
SPLIT = EACH + "{% for word in m.content.split(' ') %}{{ word }}{% if not loop.last %} {% endif %}" + END + END
LETTERS = EACH + "{% for letter in m.content %}{{ letter }}" + END + END
EITHER = (
    EACH + "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}({{ p.text }}){% endfor %}"
    "{% endif %}" + END
)
UPPER = EACH + "{{ m.content | upper }}" + END
JSON = EACH + "{{ m.content | tojson }}" + END

MIXED = (
    "{% if messages[0].role == 'system' %}{{ '<system>' + messages[0].content | trim }}"
    "{% set messages = messages[1:] %}{% endif %}" + LOOP
)
LAST = "<user>{{ messages[-1].content }}"
LAST_PART = "<user>{% for p in messages[-1].content %}{{ p.text }}{% endfor %}"


def template_of(source: str) -> ChatTemplate:
    return ChatTemplate(source, special_tokens={})


def written(source: str, *turns: tuple[str, str]) -> str:
    template = template_of(source)
    assert template.learn_forms()
    return template.render([Message(role=role, content=content) for role, content in turns], add_generation_prompt=True)


@pytest.mark.parametrize(
    "source", [LOOP, FIRST, MAPPED, MACRO, NO_TEXT, NO_SYSTEM, ALTERNATE, PLAIN, SPLIT, LETTERS, EITHER, MIXED]
)
def test_all_that_was_said_is_in_the_prompt(source: str) -> None:
    assert written(source, *TURNS) == "<user>What is 2+2?<assistant>Four.<user>Thanks!"


def test_a_role_whose_words_are_read_as_text_gets_text_beside_others_that_get_parts() -> None:
    assert written(MIXED, SYSTEM, *TURNS).startswith("<system>Be brief.<user>What is 2+2?")


@pytest.mark.parametrize("source", [LAST, LAST_PART])
def test_a_template_that_reads_the_last_message_alone_gets_it_as_it_wants(source: str) -> None:
    assert written(source, *TURNS) == "<user>Thanks!"


def test_a_template_that_takes_texts_gets_texts() -> None:
    assert written(UPPER, ("user", "Hi")) == "<user>HI"
    assert written(JSON, ("user", "Hi")) == '<user>"Hi"'
    assert "(" not in written(EITHER, ("user", "Hi"))


@pytest.mark.parametrize("source", ALL.values(), ids=ALL.keys())
def test_templates_of_well_known_families_get_texts(source: str) -> None:
    template = ChatTemplate(source, special_tokens={"bos_token": "<s>", "eos_token": "</s>"})
    before = template.render([Message(role="user", content="Hi")], add_generation_prompt=True)
    assert template.learn_forms()
    assert template.render([Message(role="user", content="Hi")], add_generation_prompt=True) == before


def test_a_role_that_is_not_known_gets_what_users_get() -> None:
    assert written(LOOP, ("tool", "3")) == "<tool>3"


@pytest.mark.parametrize("source", ["<user>", EACH + END, EACH + "{{ m.text }}" + END])
def test_a_template_that_leaves_all_words_out_refuses_conversations(source: str) -> None:
    template = template_of(source)
    assert not template.learn_forms()
    with pytest.raises(InvalidRequest) as caught:
        template.render([Message(role="user", content="Hi")], add_generation_prompt=True)
    assert caught.value.field == "chat" and "leaves out what messages say" in caught.value.problem


def test_a_template_that_refuses_every_conversation_says_why_itself() -> None:
    template = template_of("{{ raise_exception('Only tools.') }}")
    assert template.learn_forms()
    with pytest.raises(InvalidRequest, match=r"Only tools\."):
        template.render([Message(role="user", content="Hi")], add_generation_prompt=True)


def test_a_slow_template_does_not_hold_up_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.model_dir.chat.MAX_RENDER_S", 0.05)
    monkeypatch.setattr("orchestrator.model_dir.chat_form.MAX_FINDING_S", 0.1)
    assert template_of("{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}").learn_forms()
