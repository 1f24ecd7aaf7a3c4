"""However an answer's tokens come, what is streamed adds up to what is sent in one piece."""

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from orchestrator.gateway.answer.detokenizer import Detokenizer
from orchestrator.gateway.answer.text import TextStream
from orchestrator.gateway.client import Accepted, AnswerTimes, ChoiceEnd, Delta, Finished, FinishReason, TokenScore
from orchestrator.gateway.http.answering.chat import Calls, ChatAnswer, ChatForm
from orchestrator.gateway.http.answering.completion import CompletionAnswer, CompletionForm
from orchestrator.gateway.http.answering.parts import Answering, Head
from orchestrator.gateway.http.answering.token_texts import Offsets, TokenTexts
from orchestrator.gateway.http.tools.hermes import HERMES
from tests.support.gateway.byte_tokens import MARKS, bytes_alone

CALL = '{"name": "f", "arguments": {"a": "é"}}'
HEAD = Head(id="x", created_s=1, model="m")


TOKENIZER = bytes_alone()
TEXTS = TokenTexts(TOKENIZER)
PARTS = st.sampled_from(["word ", "é", "水", "\n", "stop", "st", "<tool_call>" + CALL + "</tool_call>", "<tool_call>"])
ANSWERS = st.lists(PARTS, max_size=8).map("".join)
CUTS = st.lists(st.integers(0, 10_000), max_size=30)


def deltas(text: str, cuts: Sequence[int], *, stop: Sequence[str], shown: Mapping[int, str]) -> list[Delta]:
    """The events of an answer that says ``text``, its tokens cut into steps."""
    token_ids = TOKENIZER.encode(text).ids
    bounds = sorted({0, len(token_ids), *(place % (len(token_ids) + 1) for place in cuts)})
    stream, events, count = TextStream(Detokenizer(TOKENIZER), stop, (), shown), [], 0
    for start, end in pairwise(bounds):
        ids = token_ids[start:end]
        pushed = stream.push(*ids)
        ids = ids[: pushed.num_tokens]
        count += len(ids)
        is_last = pushed.matched_stop is not None or end == len(token_ids)
        rest = stream.finish() if is_last else None
        matched = pushed.matched_stop or (rest.matched_stop if rest else None)
        ending = ChoiceEnd(finish_reason=FinishReason.STOP, matched_stop=matched, completion_tokens=count)
        scores = {place: TokenScore(logprob=-float(id), top=((id, -float(id)),)) for place, id in enumerate(ids)}
        said = pushed.text + (rest.text if rest else "")
        events.append(
            Delta(choice=0, first_index=start, token_ids=ids, scores=scores, text=said, end=ending if is_last else None)
        )
        if is_last:
            return events
    ending = ChoiceEnd(finish_reason=FinishReason.STOP, matched_stop=None, completion_tokens=0)
    return [Delta(choice=0, first_index=0, token_ids=[], scores={}, text=stream.finish().text, end=ending)]


def written(answering: Answering, events: Sequence[Delta]) -> list[Mapping[str, Any]]:
    times = AnswerTimes(queue_s=None, first_token_s=None, per_token_s=None)
    finished = Finished(
        outcome=FinishReason.STOP, prompt_tokens=1, completion_tokens=sum(len(event.token_ids) for event in events),
        cached_prompt_tokens=None, times=times, total_s=1.0, matched_stop=None, replica="r",
    )  # fmt: skip
    opening = Accepted(request_id="x", model="m", prompt_tokens=1, seed=1)
    objects = [item for event in (opening, *events, finished) for item in answering.take(0, event)]
    return json.loads(json.dumps([*objects, *answering.end()]))  # type: ignore[no-any-return]


def chat(is_stream: bool, *, tools: bool) -> ChatAnswer:
    calls = Calls(family=HERMES, several=True, is_named=False, new_id=lambda count: "c" * count) if tools else None
    form = ChatForm(
        num_choices=1, top_logprobs=1, with_ids=True, is_stream=is_stream, with_usage=True, calls=calls
    )  # fmt: skip
    return ChatAnswer(head=HEAD, form=form, texts=TEXTS)


@given(text=ANSWERS, cuts=CUTS, stop=st.sampled_from([[], ["stop"], ["水\n", "word st"]]), tools=st.booleans())
def test_a_streamed_chat_adds_up(text: str, cuts: list[int], stop: list[str], tools: bool) -> None:
    shown = MARKS if tools else {}
    (whole,) = written(chat(False, tools=tools), deltas(text, [], stop=stop, shown=shown))
    *chunks, last = written(chat(True, tools=tools), deltas(text, cuts, stop=stop, shown=shown))
    message, (expected,) = whole["choices"][0]["message"], whole["choices"]
    parts = [chunk["choices"][0] for chunk in chunks]
    assert "".join(part["delta"].get("content", "") for part in parts) == (message["content"] or "")
    calls = [call for part in parts for call in part["delta"].get("tool_calls", ())]
    assert [call.pop("index") for call in calls] == list(range(len(calls)))
    assert calls == message.get("tool_calls", [])
    assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + [expected["finish_reason"]]
    assert [id for part in parts for id in part["token_ids"]] == expected["token_ids"]
    scored = [entry for part in parts if part["logprobs"] for entry in part["logprobs"]["content"]]
    assert scored == expected["logprobs"]["content"]
    assert last["usage"] == whole["usage"]


@given(text=ANSWERS, cuts=CUTS, stop=st.sampled_from([[], ["stop"], ["水\n", "word st"]]))
def test_streamed_completions_add_up(text: str, cuts: list[int], stop: list[str]) -> None:
    def answering(is_stream: bool) -> CompletionAnswer:
        form = CompletionForm(
            num_choices=1, logprobs=1, as_ids=False, with_ids=True, is_stream=is_stream, with_usage=True
        )
        return CompletionAnswer(head=HEAD, form=form, num_prompts=1, texts=TEXTS)

    (whole,) = written(answering(False), deltas(text, [], stop=stop, shown={}))
    *chunks, last = written(answering(True), deltas(text, cuts, stop=stop, shown={}))
    (expected,), parts = whole["choices"], [chunk["choices"][0] for chunk in chunks]
    assert "".join(part["text"] for part in parts) == expected["text"]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [item for part in parts for item in part["logprobs"][name]] == expected["logprobs"][name]
    assert [part["finish_reason"] for part in parts][-1] == expected["finish_reason"] == "stop"
    assert last["usage"] == whole["usage"]


def test_special_tokens_are_written_out_where_a_form_needs_them_alone() -> None:
    text = f"Let me see. <tool_call>{CALL}</tool_call>"
    (whole,) = written(chat(False, tools=True), deltas(text, [3, 20], stop=[], shown=MARKS))
    message = whole["choices"][0]["message"]
    assert message["content"] == "Let me see."
    assert message["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"a": "é"}'}
    assert whole["choices"][0]["finish_reason"] == "tool_calls"
    (plain,) = written(chat(False, tools=False), deltas(text, [3, 20], stop=[], shown={}))
    assert plain["choices"][0]["message"]["content"] == f"Let me see. {CALL}"


@given(text=st.text(st.characters(codec="utf-8", exclude_categories=("Cs",))))
def test_offsets_are_where_the_characters_of_tokens_begin(text: str) -> None:
    token_ids = TOKENIZER.encode(text).ids
    starts = [place for place, character in enumerate(text) for _ in character.encode()]
    assert Offsets(TEXTS).of(token_ids) == starts


def test_tokens_of_sentencepiece_are_called_what_they_stand_for() -> None:
    tokenizer = Tokenizer(models.BPE({"<unk>": 0, "▁a": 1, "<0xC3>": 2, "<0xA9>": 3}, [], unk_token="<unk>"))
    tokenizer.add_special_tokens(["</s>"])
    texts = TokenTexts(tokenizer)
    assert [texts.text_of(i) for i in (1, 2, 4)] == [" a", "\N{REPLACEMENT CHARACTER}", "</s>"]
    assert [texts.bytes_of(i) for i in (1, 2, 4)] == [b" a", b"\xc3", b""]
