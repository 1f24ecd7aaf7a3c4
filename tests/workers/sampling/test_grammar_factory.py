"""Checks which grammars are refused, how long they are kept compiled, and how threads share them."""

import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from placement.errors import InvalidRequest
from tests.support.grammars import (
    DEMO,
    EOS,
    NUM_WORDS,
    PERSON,
    VOCAB_SIZE,
    allowed,
    generate,
    grammar_factory,
    json_schema,
    lark,
    regex,
)
from tests.support.tokenizer import save_tokenizer
from workers.sampling.grammar import (
    MAX_SOURCE_BYTES,
    GrammarFactory,
    GrammarFailed,
    GrammarSpec,
    fill_all,
)


@pytest.fixture(scope="module")
def factory() -> GrammarFactory:
    return grammar_factory(DEMO, vocab_size=VOCAB_SIZE, eos_token_ids=EOS)


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        (GrammarSpec(kind="json_schema", source='{"type": "object"'), "is not a JSON Schema"),
        (GrammarSpec(kind="json_schema", source="[1]"), "is not a JSON Schema"),
        (GrammarSpec(kind="json_schema", source='{}}, {"lark_grammar": "start: /x/"'), "is not a JSON Schema"),
        (json_schema({"not": {"type": "null"}}), 'Unimplemented keys: ["not"]'),
        (json_schema({"type": "string", "pattern": "(?=a)b"}), "look-around"),
        (json_schema({"type": "integer", "minimum": 5, "maximum": 3}), "Unsatisfiable"),
        (json_schema({"$ref": "#"}), "no token can follow"),
        (json_schema({"$ref": "https://example.org/schema"}), "retrieving it failed"),
        (regex("("), "unclosed group"),
        (regex(r"(a)\1"), "backreferences are not supported"),
        (regex("a^b"), "not supported"),
        (regex(r"[^\x00-\x{10FFFF}]"), "no token can follow"),
        (lark("start: missing"), "unknown name"),
        (lark(""), "Empty grammar"),
        (lark('start: "a" <|missing|>'), "unknown special token"),
        (regex("x" * (MAX_SOURCE_BYTES + 1)), "is longer than 65536 bytes"),
    ],
)
def test_what_is_no_grammar_is_refused_with_its_problem(
    spec: GrammarSpec, problem: str, factory: GrammarFactory
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        factory.compile(spec)
    assert caught.value.field == "grammar" and problem in caught.value.problem
    assert len(str(caught.value)) < 600


def test_lately_used_grammars_are_kept_compiled(factory: GrammarFactory) -> None:
    kept = factory.compile(json_schema(PERSON))
    for index in range(40):
        factory.compile(regex(f"number {index}"))
        assert factory.compile(json_schema(PERSON)) is kept
    left = regex("number 0")
    assert factory.compile(left) is factory.compile(left)


def test_a_grammar_whose_lexer_reached_its_limit_is_compiled_anew(factory: GrammarFactory) -> None:
    spec = regex("([a-z]{1,1000}|[0-9]{1,1000}-){1,1000}")
    grammar = factory.compile(spec)
    state = grammar.start()
    with pytest.raises(GrammarFailed, match="too many expressions"):
        for _ in range(100):
            state.accept(int(allowed(state).nonzero()[-1]))
    anew = factory.compile(spec)
    assert anew is not grammar and factory.compile(spec) is anew


def test_a_tokenizer_that_cannot_be_followed_refuses_grammars_only(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    unknown = grammar_factory(tmp_path, vocab_size=VOCAB_SIZE, eos_token_ids=EOS)
    missing = grammar_factory(tmp_path / "none", vocab_size=VOCAB_SIZE, eos_token_ids=EOS)
    too_small = grammar_factory(DEMO, vocab_size=10, eos_token_ids=EOS)
    endless = grammar_factory(DEMO, vocab_size=VOCAB_SIZE, eos_token_ids=())
    for factory, problem in (
        (unknown, "tokenizer.json is of another kind"),
        (missing, "tokenizer.json is of another kind"),
        (too_small, "tokenizer.json is of another kind"),
        (endless, "no end-of-sequence id"),
    ):
        factory.prepare()
        with pytest.raises(InvalidRequest, match=problem):
            factory.compile(regex("a"))


def test_ends_that_the_tokenizer_lacks_hinder_no_grammar() -> None:
    """A model may have more rows than its tokenizer has tokens, and configurations name such as ends."""
    beyond = VOCAB_SIZE - 1
    factory = grammar_factory(DEMO, vocab_size=VOCAB_SIZE, eos_token_ids=(*EOS, beyond))
    state = factory.compile(regex("a")).start()
    assert not allowed(state)[beyond]
    only = grammar_factory(DEMO, vocab_size=VOCAB_SIZE, eos_token_ids=(beyond,))
    with pytest.raises(InvalidRequest, match="tokenizer lacks its end-of-sequence id"):
        only.compile(regex("a"))


def test_grammars_know_the_tokens_that_other_files_add(tmp_path: Path) -> None:
    """Without them the model could not end such an answer: its turns end with a token that tokenizer.json lacks."""
    tokenizer = save_tokenizer(tmp_path)
    end = tokenizer.get_vocab_size()
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_end|>": end}))
    factory = grammar_factory(tmp_path, vocab_size=VOCAB_SIZE, eos_token_ids=(end,))
    state = factory.compile(regex("a?")).start()
    assert allowed(state)[end]


def test_threads_compile_and_walk_one_grammar_at_once(factory: GrammarFactory, closing: Tensor) -> None:
    fresh = grammar_factory(DEMO, vocab_size=VOCAB_SIZE, eos_token_ids=EOS)
    answers: dict[int, list[list[int]]] = {}

    def walk(thread: int) -> None:
        grammar = fresh.compile(json_schema(PERSON))
        answers[thread] = [generate(grammar.start(), seed, closing) for seed in range(4)]

    threads = [threading.Thread(target=walk, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = [generate(factory.compile(json_schema(PERSON)).start(), seed, closing) for seed in range(4)]
    assert list(answers.values()) == [expected] * 4


@pytest.fixture
def unshared_interpreter() -> Iterator[None]:
    """Lets threads that run Python keep the interpreter's lock until they release it, for as long as a test lasts."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000.0)
    yield
    sys.setswitchinterval(interval)


def test_filling_masks_lets_go_of_the_interpreters_lock(factory: GrammarFactory, unshared_interpreter: None) -> None:
    states = [factory.compile(regex("[a-z]+")).start(), factory.compile(json_schema(PERSON)).start()]
    rows = torch.zeros(len(states), NUM_WORDS, dtype=torch.int32)
    gate, moved = threading.Event(), threading.Event()

    def other() -> None:
        gate.wait()
        moved.set()

    thread = threading.Thread(target=other)
    thread.start()
    gate.set()
    deadline_s = time.monotonic() + 0.05
    while time.monotonic() < deadline_s:
        assert not moved.is_set(), "the other thread moves even while this one keeps the lock"
    deadline_s = time.monotonic() + 30
    while not moved.is_set() and time.monotonic() < deadline_s:
        fill_all(states, rows)
    assert moved.is_set()
    thread.join()
