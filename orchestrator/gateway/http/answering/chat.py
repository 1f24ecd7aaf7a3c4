"""Writes answers as turns of a conversation, streamed or in one piece. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from orchestrator.gateway.client import Accepted, ChoiceEnd, Delta, Event, Finished
from orchestrator.gateway.http.answering.logprobs import chat_logprobs
from orchestrator.gateway.http.answering.parts import Head, usage
from orchestrator.gateway.http.answering.token_texts import TokenTexts


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatForm:
    """How a client wants the turn.

    Attributes:
        num_choices: how many turns there are to choose from.
        top_logprobs: how many alternatives to each token; None: no log-probabilities.
        with_ids: whether the ids of tokens are sent too.
        is_stream: whether the answer is sent piece by piece.
        with_usage: whether a stream ends in what was used.
    """

    num_choices: int
    top_logprobs: int | None
    with_ids: bool
    is_stream: bool
    with_usage: bool


@dataclass(slots=True)
class _Turn:
    """What a choice has come to."""

    content: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    end: ChoiceEnd | None = None


class ChatAnswer:
    """Writes the turns of one request."""

    def __init__(self, *, head: Head, form: ChatForm, texts: TokenTexts) -> None:
        self.is_stream = form.is_stream
        self._head = head.of("chat.completion.chunk" if form.is_stream else "chat.completion")
        self._form = form
        self._texts = texts
        self._turns = [_Turn() for _ in range(form.num_choices)]
        self._finished: list[Finished] = []

    def take(self, prompt: int, event: Event) -> Sequence[Mapping[str, Any]]:
        """Takes the next event of the answer; returns the objects that are sent of it."""
        match event:
            case Delta():
                return self._piece(event)
            case Accepted() if self.is_stream:
                opening = {"role": "assistant", "content": ""}
                return [self._chunk(index, opening) for index in range(self._form.num_choices)]
            case Finished():
                self._finished.append(event)
        return ()

    def end(self) -> Sequence[Mapping[str, Any]]:
        """Returns the last objects."""
        if self.is_stream:
            return [{**self._head, "choices": [], "usage": usage(self._finished)}] if self._form.with_usage else ()
        choices = [self._choice(index, turn) for index, turn in enumerate(self._turns)]
        return [{**self._head, "choices": choices, "usage": usage(self._finished)}]

    def _piece(self, delta: Delta) -> Sequence[Mapping[str, Any]]:
        num_top = self._form.top_logprobs
        logprobs = (
            None
            if num_top is None
            else chat_logprobs(delta.token_ids, delta.scores, num_top=num_top, texts=self._texts)
        )
        if self.is_stream:
            if not (delta.text or delta.end or logprobs or self._form.with_ids):
                return ()
            said = {"content": delta.text} if delta.text or not delta.end else {}
            return [self._chunk(delta.choice, said, logprobs, delta.end, delta.token_ids)]
        turn = self._turns[delta.choice]
        turn.content.append(delta.text)
        turn.token_ids.extend(delta.token_ids)
        turn.logprobs.extend(logprobs or ())
        turn.end = delta.end or turn.end
        return ()

    def _chunk(
        self,
        index: int,
        said: Mapping[str, Any],
        logprobs: list[dict[str, Any]] | None = None,
        end: ChoiceEnd | None = None,
        token_ids: Sequence[int] = (),
    ) -> Mapping[str, Any]:
        choice = {"index": index, "delta": said, **self._rest(logprobs, end, token_ids)}
        no_usage = {"usage": None} if self._form.with_usage else {}
        return {**self._head, "choices": [choice], **no_usage}

    def _choice(self, index: int, turn: _Turn) -> dict[str, Any]:
        message = {"role": "assistant", "content": "".join(turn.content), "refusal": None}
        logprobs = None if self._form.top_logprobs is None else turn.logprobs
        return {"index": index, "message": message, **self._rest(logprobs, turn.end, turn.token_ids)}

    def _rest(
        self, logprobs: list[dict[str, Any]] | None, end: ChoiceEnd | None, token_ids: Sequence[int]
    ) -> dict[str, Any]:
        return {
            "logprobs": None if logprobs is None else {"content": logprobs, "refusal": None},
            "finish_reason": None if end is None else end.finish_reason.value,
            "stop_reason": None if end is None else end.matched_stop,
            **({"token_ids": list(token_ids)} if self._form.with_ids else {}),
        }
