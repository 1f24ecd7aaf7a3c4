"""Reads the two kinds of request for an answer, and makes what writes their answers."""

import time

from orchestrator.gateway.http.answering.chat import ChatAnswer, ChatForm
from orchestrator.gateway.http.answering.completion import CompletionAnswer, CompletionForm
from orchestrator.gateway.http.answering.parts import Head
from orchestrator.gateway.http.answering.token_texts import TokenTexts
from orchestrator.gateway.http.asking.body import read_body
from orchestrator.gateway.http.asking.chat import ChatBody, chat_message
from orchestrator.gateway.http.asking.completion import CompletionBody, completion_messages
from orchestrator.gateway.http.asking.names import CHAT, CHAT_NEWER, COMPLETION
from orchestrator.gateway.http.exchange import Asked
from orchestrator.gateway.model import ServedModel


class Asks:
    """Reads the bodies of requests to one model."""

    def __init__(self, model: ServedModel) -> None:
        self._model = model
        self._texts = TokenTexts(model.tokenizer)

    def chat(self, data: bytes, request_id: str) -> Asked:
        """Reads a request for the next turn of a conversation. Raises InvalidRequest."""
        body = read_body(ChatBody, data)
        message = chat_message(body, request_id=request_id)
        form = ChatForm(
            num_choices=body.num_choices,
            top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            with_ids=bool(body.return_token_ids),
            is_stream=bool(body.stream),
            with_usage=body.wants_usage,
        )
        return Asked(
            messages=(message,),
            answering=ChatAnswer(head=self._head("chatcmpl", request_id), form=form, texts=self._texts),
            names=CHAT if body.max_completion_tokens is None else CHAT_NEWER,
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
        return Asked(messages=messages, answering=answering, names=COMPLETION)

    def _head(self, kind: str, request_id: str) -> Head:
        return Head(id=f"{kind}-{request_id}", created_s=int(time.time()), model=self._model.name)
