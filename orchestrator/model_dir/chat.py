"""Owns chat templates: the Jinja program beside a model that writes a conversation out as the model's prompt.

The format is that of transformers' ``apply_chat_template``.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from orchestrator.brief import brief
from orchestrator.model_dir.chat_form import ALL_TEXT, Forms, find_forms, written
from orchestrator.model_dir.chat_sandbox import DEADLINE, MAX_RENDER_S, check_size, compile_template, variables_of
from placement.errors import InvalidModel, InvalidRequest, cause_of

LEAVES_OUT = "the model's chat template leaves out what messages say, given as text and as parts"
_MAX_REASON_CHARACTERS = 500
_NO_VALUES: Mapping[str, Any] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a conversation.

    Attributes:
        more: what else a template may read of it, such as ``tool_calls``.
    """

    role: str
    content: str
    more: Mapping[str, Any] = field(default_factory=dict)


class ChatTemplate:
    """A compiled chat template. Safe to use from several threads.

    It gets what messages say as texts, unless :meth:`learn_forms` finds that it wants parts.

    Args:
        source: the template.
        special_tokens: what ``bos_token``, ``eos_token`` and the like stand for; one not given is written as nothing.
        field: where the template is from, for the error.
        now: the clock of ``strftime_now``.

    Attributes:
        source: the template.
        takes_tools: whether it reads which tools there are.

    Raises:
        InvalidModel: it is no Jinja template.
    """

    def __init__(
        self,
        source: str,
        *,
        special_tokens: Mapping[str, str],
        field: str = "chat_template.jinja",
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens)
        self._forms: Forms | None = ALL_TEXT
        try:
            self._template = compile_template(source, now=now)
            self.takes_tools = "tools" in variables_of(source)
        except TemplateSyntaxError as error:
            raise _not_a_template(field, f"line {error.lineno}: {error.message}") from None
        except Exception as error:  # what Python has against the code that Jinja makes of it
            raise _not_a_template(field, cause_of(error)) from None

    def learn_forms(self) -> bool:
        """Finds out in which form the template reads what messages say; returns whether it keeps that in any.

        Where it does not, conversations are refused from now on.
        """
        self._forms = find_forms(lambda messages: self._write(messages, add_generation_prompt=True))
        return self._forms is not None

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
        values: Mapping[str, Any] = _NO_VALUES,
    ) -> str:
        """Returns the conversation as the model's prompt. Special tokens are written out: tokenizing must add none.

        Computes for about ``MAX_RENDER_S`` at most, and some 0.1 ms where the conversation is short.

        Args:
            tools: what the model may call; None where there is nothing.
            values: further variables of the template.

        Raises:
            InvalidRequest: the template refuses the conversation, fails on it, takes too long or writes too much.
        """
        forms = self._forms
        if forms is None:
            raise _unread(len(messages))
        deadline_s = time.monotonic() + MAX_RENDER_S
        try:
            return self._write(
                [{**written(message.role, message.content, forms), **message.more} for message in messages],
                add_generation_prompt=add_generation_prompt,
                deadline_s=deadline_s,
                more={**values, "tools": tools},
            )
        except Exception as error:  # templates compute: whatever Python can raise, they can
            raise _refusal(error, len(messages)) from None

    def _write(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        deadline_s: float | None = None,
        more: Mapping[str, Any] = _NO_VALUES,
    ) -> str:
        values = {
            "tools": None,
            "documents": None,
            **more,
            **self._special_tokens,
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
            DEADLINE: time.monotonic() + MAX_RENDER_S if deadline_s is None else deadline_s,
        }
        pieces: list[str] = []
        num_characters = 0
        for piece in self._template.generate(values):
            num_characters += len(piece)
            check_size(num_characters)
            pieces.append(piece)
        return "".join(pieces)


def _not_a_template(field: str, reason: str) -> InvalidModel:
    return InvalidModel(
        field=field,
        problem=f"is not a chat template in Jinja's language: {reason}",
        fix="Use the chat template that was saved with the model.",
    )


def _refusal(error: Exception, num_messages: int) -> InvalidRequest:
    words = str(error) if isinstance(error, TemplateError) else cause_of(error)
    reason = brief(words, _MAX_REASON_CHARACTERS)
    return InvalidRequest(
        field="chat",
        value=f"{num_messages} messages",
        problem=f"cannot be written as a prompt by the model's chat template: {reason}",
        fix="Send the roles, and the order of messages, that the model knows.",
    )


def _unread(num_messages: int) -> InvalidRequest:
    return InvalidRequest(
        field="chat",
        value=f"{num_messages} messages",
        problem=f"cannot be written as a prompt: {LEAVES_OUT}",
        fix="Send prompt instead, or serve the model with another chat_template.jinja.",
    )


def template_source(tokenizer_config: Mapping[str, Any]) -> str | None:
    """Returns the template inside tokenizer_config.json: the only one, or of several the one named ``default``.

    Raises:
        InvalidModel: ``chat_template`` is something else.
    """
    value = tokenizer_config.get("chat_template")
    if value is None:
        return None
    problem = "is not a text"
    if isinstance(value, list):
        named = [item for item in value if isinstance(item, dict) and item.get("name") == "default"]
        value = named[0].get("template") if named else None
        problem = "holds no template named default"
    if not isinstance(value, str):
        raise InvalidModel(
            field="tokenizer_config.json: chat_template",
            value=tokenizer_config["chat_template"],
            problem=problem,
            fix="Put the template to be used beside it, as chat_template.jinja.",
        )
    return value
