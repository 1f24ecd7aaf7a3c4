"""Writes answers as completions, streamed or in one piece. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from orchestrator.gateway.client import ChoiceEnd, Delta, Echoed, Event, Finished, TokenScore
from orchestrator.gateway.http.answering.logprobs import CompletionLogprobs, join_logprobs
from orchestrator.gateway.http.answering.parts import Head, usage
from orchestrator.gateway.http.answering.token_texts import Offsets, TokenTexts

_KIND = "text_completion"


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionForm:
    """How a client wants its completions.

    Attributes:
        num_choices: of each prompt.
        logprobs: how many alternatives to each token; None: no log-probabilities.
        as_ids: whether log-probabilities name tokens by their ids.
        with_ids: whether the ids of tokens are sent too.
        is_stream: whether the answer is sent piece by piece.
        with_usage: whether a stream ends in what was used.
    """

    num_choices: int
    logprobs: int | None
    as_ids: bool
    with_ids: bool
    is_stream: bool
    with_usage: bool


@dataclass(slots=True)
class _Whole:
    """Collects what one choice of an answer has come to."""

    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    end: ChoiceEnd | None = None


class CompletionAnswer:
    """Writes the completions of one request. A prompt's choices follow those of the prompt before it."""

    def __init__(self, *, head: Head, form: CompletionForm, num_prompts: int, texts: TokenTexts) -> None:
        self.is_stream = form.is_stream
        self._head = head.of(_KIND)
        self._form = form
        count = num_prompts * form.num_choices
        self._wholes = [_Whole() for _ in range(count)]
        self._logprobs = (
            [
                CompletionLogprobs(texts=texts, offsets=Offsets(texts), num_top=form.logprobs, as_ids=form.as_ids)
                for _ in range(count)
            ]
            if form.logprobs is not None
            else None
        )
        self._finished: list[Finished] = []

    def take(self, prompt: int, event: Event) -> Sequence[Mapping[str, Any]]:
        """Takes the next event of a prompt's answer; returns the objects that are sent of it."""
        first = prompt * self._form.num_choices
        match event:
            case Delta():
                return self._piece(first + event.choice, event.text, event.token_ids, event.scores, event.end)
            case Echoed():
                # The prompt is told once, and begins every choice.
                pieces = [
                    self._piece(first + choice, event.text, event.token_ids, event.scores, None)
                    for choice in range(self._form.num_choices)
                ]
                return [item for piece in pieces for item in piece]
            case Finished():
                self._finished.append(event)
        return ()

    def end(self) -> Sequence[Mapping[str, Any]]:
        """Returns the last objects."""
        if self.is_stream:
            return [{**self._head, "choices": [], "usage": usage(self._finished)}] if self._form.with_usage else ()
        choices = [self._whole(index, whole) for index, whole in enumerate(self._wholes)]
        return [{**self._head, "choices": choices, "usage": usage(self._finished)}]

    def _piece(
        self,
        index: int,
        text: str,
        token_ids: Sequence[int],
        scores: Mapping[int, TokenScore],
        end: ChoiceEnd | None,
    ) -> Sequence[Mapping[str, Any]]:
        logprobs = None if self._logprobs is None else self._logprobs[index].take(token_ids, scores)
        if self.is_stream:
            if not (text or end or logprobs or self._form.with_ids):
                return ()
            return [self._chunk(self._choice(index, text, logprobs, end, token_ids))]
        whole = self._wholes[index]
        whole.text.append(text)
        whole.token_ids.extend(token_ids)
        if logprobs is not None:
            whole.logprobs.append(logprobs)
        whole.end = end or whole.end
        return ()

    def _chunk(self, choice: Mapping[str, Any]) -> Mapping[str, Any]:
        no_usage = {"usage": None} if self._form.with_usage else {}
        return {**self._head, "choices": [choice], **no_usage}

    def _whole(self, index: int, whole: _Whole) -> dict[str, Any]:
        logprobs = None if self._logprobs is None else join_logprobs(whole.logprobs)
        return self._choice(index, "".join(whole.text), logprobs, whole.end, whole.token_ids)

    def _choice(
        self,
        index: int,
        text: str,
        logprobs: Mapping[str, Any] | None,
        end: ChoiceEnd | None,
        token_ids: Sequence[int],
    ) -> dict[str, Any]:
        return {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": None if end is None else end.finish_reason.value,
            "stop_reason": None if end is None else end.matched_stop,
            **({"token_ids": list(token_ids)} if self._form.with_ids else {}),
        }
