"""Reads the two kinds of request for an answer, and makes what writes their answers."""

import secrets
import string
import time

from orchestrator.gateway.http.answering.chat import Calls, ChatAnswer, ChatForm
from orchestrator.gateway.http.answering.completion import CompletionAnswer, CompletionForm
from orchestrator.gateway.http.answering.parts import Head
from orchestrator.gateway.http.answering.token_texts import TokenTexts
from orchestrator.gateway.http.asking.body import read_body
from orchestrator.gateway.http.asking.chat import ChatBody, chat_message
from orchestrator.gateway.http.asking.completion import CompletionBody, completion_messages
from orchestrator.gateway.http.asking.names import CHAT, COMPLETION, FORCED, NEWER, STRUCTURED
from orchestrator.gateway.http.exchange import Asked
from orchestrator.gateway.http.tools.families import family_of, forced
from orchestrator.gateway.model import ServedModel
from placement.errors import InvalidRequest

_ID_CHARACTERS = string.ascii_letters + string.digits


class Asks:
    """Reads the bodies of requests to one model."""

    def __init__(self, model: ServedModel) -> None:
        self._model = model
        self._texts = TokenTexts(model.tokenizer)
        self._family = None if model.chat_template is None else family_of(model.chat_template.source)
        markers = () if self._family is None else self._family.markers
        ids = ((marker, model.tokenizer.token_to_id(marker)) for marker in markers)
        self._shown = {token_id: marker for marker, token_id in ids if token_id is not None}

    def chat(self, data: bytes, request_id: str) -> Asked:
        """Reads a request for the next turn of a conversation. Raises InvalidRequest."""
        body = read_body(ChatBody, data)
        message = chat_message(body, request_id=request_id)
        calls = self._calls(body) if message.chat.tools else None
        form = ChatForm(
            num_choices=body.num_choices,
            top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            with_ids=bool(body.return_token_ids),
            is_stream=bool(body.stream),
            with_usage=body.wants_usage,
            calls=calls,
        )
        newer = {} if body.max_completion_tokens is None else NEWER
        structured = {} if body.structured_outputs is None else STRUCTURED
        return Asked(
            messages=(message,),
            answering=ChatAnswer(head=self._head("chatcmpl", request_id), form=form, texts=self._texts),
            names={**CHAT, **newer, **structured, **(FORCED if calls is not None and _is_forced(body) else {})},
            shown_tokens=self._shown if calls is not None else {},
        )

    def _calls(self, body: ChatBody) -> Calls:
        """Returns how calls are read. Raises InvalidRequest where the model's form of them is not known."""
        family = self._family
        if family is None:
            raise InvalidRequest(
                field="tools",
                problem=f"cannot be used: it is not known in which form {self._model.name} calls them",
                fix="Leave them out, or serve a model whose chat template is of Hermes, Qwen, Llama 3 or Mistral.",
            )
        name = body.tool_choice[0] if isinstance(body.tool_choice, tuple) else None
        return Calls(
            family=forced(name, family) if _is_forced(body) else family,
            several=body.parallel_tool_calls is not False,
            is_named=name is not None,
            new_id=_new_id,
        )

    def completion(self, data: bytes, request_id: str) -> Asked:
        """Reads a request for completions. Raises InvalidRequest."""
        body = read_body(CompletionBody, data)
        messages = completion_messages(body, request_id=request_id)
        form = CompletionForm(
            num_choices=body.num_choices,
            logprobs=body.logprobs,
            as_ids=bool(body.return_tokens_as_token_ids),
            with_ids=bool(body.return_token_ids),
            is_stream=bool(body.stream),
            with_usage=body.wants_usage,
        )
        answering = CompletionAnswer(
            head=self._head("cmpl", request_id), form=form, num_prompts=len(messages), texts=self._texts
        )
        structured = {} if body.structured_outputs is None else STRUCTURED
        return Asked(messages=messages, answering=answering, names={**COMPLETION, **structured})

    def _head(self, kind: str, request_id: str) -> Head:
        return Head(id=f"{kind}-{request_id}", created_s=int(time.time()), model=self._model.name)


def _is_forced(body: ChatBody) -> bool:
    return body.tool_choice not in (None, "auto", "none")


def _new_id(num_characters: int) -> str:
    return "".join(secrets.choice(_ID_CHARACTERS) for _ in range(num_characters))
