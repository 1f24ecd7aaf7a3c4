"""Writes answers as turns of a conversation, streamed or in one piece. Pure."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from orchestrator.gateway.client import Accepted, ChoiceEnd, Delta, Event, Finished, FinishReason
from orchestrator.gateway.http.answering.logprobs import chat_logprobs
from orchestrator.gateway.http.answering.parts import Head, usage
from orchestrator.gateway.http.answering.token_texts import TokenTexts
from orchestrator.gateway.http.tools.reading import Family, ToolStream


@dataclass(frozen=True, slots=True, kw_only=True)
class Calls:
    """How calls of tools are read and told.

    Attributes:
        several: whether more than the first call is told.
        is_named: whether the client named the function: then the answer ends as any other does.
        new_id: makes the id of a call.
    """

    family: Family
    several: bool
    is_named: bool
    new_id: Callable[[int], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatForm:
    """How a client wants the turn.

    Attributes:
        num_choices: how many turns there are to choose from.
        top_logprobs: how many alternatives to each token; None: no log-probabilities.
        with_ids: whether the ids of tokens are sent too.
        is_stream: whether the answer is sent piece by piece.
        with_usage: whether a stream ends in what was used.
        calls: how calls of tools are read; None where there are none to be.
    """

    num_choices: int
    top_logprobs: int | None
    with_ids: bool
    is_stream: bool
    with_usage: bool
    calls: Calls | None = None


@dataclass(slots=True)
class _Turn:
    """Collects what one choice of an answer has come to."""

    tools: ToolStream | None
    content: list[str] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
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
        tools = None if form.calls is None else form.calls.family
        self._turns = [_Turn(None if tools is None else ToolStream(tools)) for _ in range(form.num_choices)]
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
        turn, num_top = self._turns[delta.choice], self._form.top_logprobs
        logprobs = None
        if num_top is not None:
            logprobs = chat_logprobs(delta.token_ids, delta.scores, num_top=num_top, texts=self._texts)
        turn.end = delta.end
        content, calls = self._read(turn, delta)
        turn.calls += calls
        if self.is_stream:
            if not (content or calls or delta.end or logprobs or self._form.with_ids):
                return ()
            said: dict[str, Any] = {"content": content} if content or not (delta.end or calls) else {}
            if calls:
                said["tool_calls"] = calls
            return [self._chunk(delta.choice, said, logprobs, delta.token_ids)]
        turn.content.append(content)
        turn.token_ids.extend(delta.token_ids)
        turn.logprobs.extend(logprobs or ())
        return ()

    def _read(self, turn: _Turn, delta: Delta) -> tuple[str, list[dict[str, Any]]]:
        """Returns the content and the calls that are certain now."""
        if turn.tools is None or self._form.calls is None:
            return delta.text, []
        items = turn.tools.push(delta.text)
        if delta.end is not None:
            items += turn.tools.finish()
        content = ""
        calls: list[dict[str, Any]] = []
        for item in items:
            if isinstance(item, str):
                content += item
                continue
            index = len(turn.calls) + len(calls)
            if index and not self._form.calls.several:
                continue
            function = {"name": item.name, "arguments": item.arguments}
            id = self._form.calls.new_id(self._form.calls.family.id_characters)
            numbered = {"index": index} if self.is_stream else {}
            calls.append({**numbered, "id": id, "type": "function", "function": function})
        return content, calls

    def _chunk(
        self,
        index: int,
        said: Mapping[str, Any],
        logprobs: list[dict[str, Any]] | None = None,
        token_ids: Sequence[int] = (),
    ) -> Mapping[str, Any]:
        choice = {"index": index, "delta": said, **self._rest(self._turns[index], logprobs, token_ids)}
        no_usage = {"usage": None} if self._form.with_usage else {}
        return {**self._head, "choices": [choice], **no_usage}

    def _choice(self, index: int, turn: _Turn) -> dict[str, Any]:
        content: str | None = "".join(turn.content)
        if turn.calls and not content:
            content = None
        calls = {"tool_calls": turn.calls} if turn.calls else {}
        message = {"role": "assistant", "content": content, "refusal": None, **calls}
        logprobs = None if self._form.top_logprobs is None else turn.logprobs
        return {"index": index, "message": message, **self._rest(turn, logprobs, turn.token_ids)}

    def _rest(self, turn: _Turn, logprobs: list[dict[str, Any]] | None, token_ids: Sequence[int]) -> dict[str, Any]:
        return {
            "logprobs": None if logprobs is None else {"content": logprobs, "refusal": None},
            "finish_reason": self._finish_reason(turn),
            "stop_reason": None if turn.end is None else turn.end.matched_stop,
            **({"token_ids": list(token_ids)} if self._form.with_ids else {}),
        }

    def _finish_reason(self, turn: _Turn) -> str | None:
        if turn.end is None:
            return None
        calls = self._form.calls
        if turn.calls and calls is not None and not calls.is_named and turn.end.finish_reason is FinishReason.STOP:
            return "tool_calls"
        return turn.end.finish_reason.value
