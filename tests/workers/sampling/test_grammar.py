"""Grammars against a model of random logits: whatever it says, its answers match what was asked."""

import json
import re
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from tokenizers import Tokenizer
from torch import Tensor

from placement.errors import InvalidRequest
from placement.serving.grammar import MAX_SOURCE_BYTES, MAX_WHITESPACE
from tests.support.grammars import (
    DEMO,
    EOS,
    LARK,
    NUM_WORDS,
    PERSON,
    REGEXES,
    SCHEMAS,
    TREE,
    VOCAB_SIZE,
    allowed,
    json_schema,
    lark,
    regex,
)
from workers.sampling.grammar import (
    Grammar,
    GrammarFactory,
    GrammarFailed,
    GrammarSpec,
    GrammarState,
    fill_all,
    prefetch,
)
from workers.sampling.sampling import SampledToken, SamplerState, SamplingParams, sample

MAX_TOKENS = 200


@pytest.fixture(scope="module")
def factory() -> GrammarFactory:
    return GrammarFactory(DEMO, vocab_size=VOCAB_SIZE, eos_token_ids=EOS)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(DEMO / "tokenizer.json"))


@pytest.fixture(scope="module")
def closing(tokenizer: Tokenizer) -> Tensor:
    """[V]: how much likelier the model of these tests makes the tokens that bring an answer to its end."""
    bias = torch.zeros(VOCAB_SIZE)
    for token, token_id in tokenizer.get_vocab().items():
        bias[token_id] = 2.0 * sum(character in '"}])' for character in token) - 0.3 * len(token)
    bias[list(EOS)] = 3.0
    return bias


def generate(state: GrammarState, seed: int, closing: Tensor, max_tokens: int = MAX_TOKENS) -> list[int]:
    """Draws tokens from random logits until the grammar is done; those emitted, without an end-of-sequence id."""
    generator = torch.Generator().manual_seed(seed)
    token_ids: list[int] = []
    while not state.done and len(token_ids) < max_tokens:
        # The end comes nearer with every token, so that most answers reach it.
        logits = 3.0 * torch.randn(VOCAB_SIZE, generator=generator) + closing * (1 + len(token_ids) / 20)
        token_id = int(logits.masked_fill(~allowed(state), -torch.inf).argmax())
        state.accept(token_id)
        if token_id in EOS:
            assert state.done
        else:
            token_ids.append(token_id)
    return token_ids


def text_of(tokenizer: Tokenizer, token_ids: list[int]) -> str:
    return str(tokenizer.decode(token_ids, skip_special_tokens=False))


def after(token_ids: Iterable[int], state: GrammarState) -> GrammarState:
    for token_id in token_ids:
        state.accept(token_id)
    return state


def feed(state: GrammarState, tokenizer: Tokenizer, text: str) -> GrammarState:
    return after(tokenizer.encode(text, add_special_tokens=False).ids, state)


def follows(grammar: Grammar, tokenizer: Tokenizer, text: str) -> bool:
    """Whether ``text`` as a whole matches."""
    try:
        state = feed(grammar.start(), tokenizer, text)
    except GrammarFailed:
        return False
    return bool(allowed(state)[EOS[0]])


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: json.dumps(schema)[:40])
def test_finished_answers_fit_their_schema_and_cut_ones_can_be_finished(
    schema: dict[str, object], factory: GrammarFactory, tokenizer: Tokenizer, closing: Tensor
) -> None:
    grammar = factory.compile(json_schema(schema))
    for seed in range(6):
        state = grammar.start()
        token_ids = generate(state, seed, closing)
        assert state.done, text_of(tokenizer, token_ids)
        Draft202012Validator(schema).validate(json.loads(text_of(tokenizer, token_ids)))
        # Cut anywhere, what there is begins an answer: one that goes on from there fits as well.
        cut = token_ids[: seed * len(token_ids) // 6]
        again = after(cut, grammar.start())
        rest = generate(again, 100 + seed, closing)
        assert again.done
        Draft202012Validator(schema).validate(json.loads(text_of(tokenizer, cut + rest)))


@pytest.mark.parametrize("pattern", REGEXES)
def test_finished_answers_match_their_regular_expression(
    pattern: str, factory: GrammarFactory, tokenizer: Tokenizer, closing: Tensor
) -> None:
    grammar = factory.compile(regex(pattern))
    for seed in range(8):
        state = grammar.start()
        token_ids = generate(state, seed, closing)
        assert state.done
        assert re.fullmatch(pattern, text_of(tokenizer, token_ids)), text_of(tokenizer, token_ids)


def test_sequences_of_a_sampled_batch_keep_each_to_their_grammar(
    factory: GrammarFactory, tokenizer: Tokenizer, closing: Tensor
) -> None:
    generator = torch.Generator().manual_seed(0)
    states = [
        SamplerState(
            SamplingParams(temperature=1.0, top_k=row % 3 * 40, seed=row),
            (),
            grammar=factory.compile(json_schema(schema)).start(),
        )
        for row, schema in enumerate(SCHEMAS)
    ]
    answers: dict[int, list[int]] = {row: [] for row in range(len(SCHEMAS))}
    running = dict(enumerate(states))
    for step in range(MAX_TOKENS):
        noise = 2.0 * torch.randn(len(running), VOCAB_SIZE, generator=generator)
        tokens = sample(noise + closing * (1 + step / 20), list(running.values()))
        for (row, state), token in zip(list(running.items()), tokens, strict=True):
            assert isinstance(token, SampledToken), token
            answers[row].extend([token.token_id] * (token.token_id not in EOS))
            assert state.grammar is not None
            if state.grammar.done:
                del running[row]
        if not running:
            break
    assert not running
    for schema, answer in zip(SCHEMAS, answers.values(), strict=True):
        Draft202012Validator(schema).validate(json.loads(text_of(tokenizer, answer)))


def test_finished_answers_follow_their_lark_grammar(
    factory: GrammarFactory, tokenizer: Tokenizer, closing: Tensor
) -> None:
    grammar = factory.compile(lark(LARK))
    for seed in range(10):
        state = grammar.start()
        text = text_of(tokenizer, generate(state, seed, closing))
        assert state.done
        # Python's grammar knows these expressions; leading zeros it does not.
        eval(re.sub(r"\b0+(?=\d)", "", text), {})


@settings(max_examples=40, deadline=None)
@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=6,
    )
)
def test_any_value_can_be_the_only_answer(
    value: object, factory: GrammarFactory, tokenizer: Tokenizer, closing: Tensor
) -> None:
    state = factory.compile(json_schema({"const": value})).start()
    answer = json.loads(text_of(tokenizer, generate(state, 3, closing, max_tokens=2000)))
    assert state.done and answer == value


def test_only_the_models_end_of_sequence_ids_follow_a_complete_answer(
    factory: GrammarFactory, tokenizer: Tokenizer
) -> None:
    state = feed(factory.compile(regex("ab")).start(), tokenizer, "ab")
    assert state.done
    assert allowed(state).nonzero().flatten().tolist() == sorted(EOS)
    for token_id in EOS:
        state.accept(token_id)
    assert state.done and allowed(state).sum() == len(EOS)


@pytest.mark.parametrize("token_id", EOS)
def test_an_end_of_sequence_id_ends_an_answer_that_could_go_on(
    token_id: int, factory: GrammarFactory, tokenizer: Tokenizer
) -> None:
    state = feed(factory.compile(regex("a+")).start(), tokenizer, "aa")
    assert not state.done
    assert allowed(state)[[*EOS, *tokenizer.encode("a", add_special_tokens=False).ids]].all()
    state.accept(token_id)
    assert state.done


def test_no_end_of_sequence_id_comes_before_the_answer_matches(factory: GrammarFactory, tokenizer: Tokenizer) -> None:
    state = factory.compile(json_schema({"type": "object"})).start()
    assert not allowed(state)[list(EOS)].any()
    assert not allowed(feed(state, tokenizer, '{"a": [1, 2'))[list(EOS)].any()


def test_special_and_padding_tokens_are_never_allowed(factory: GrammarFactory, tokenizer: Tokenizer) -> None:
    state = feed(factory.compile(json_schema({"type": "string"})).start(), tokenizer, '"')
    assert allowed(state).sum() > 3000
    assert not allowed(state)[[*EOS, *range(tokenizer.get_vocab_size(), VOCAB_SIZE)]].any()


def test_whitespace_in_json_is_free_but_bounded(factory: GrammarFactory, tokenizer: Tokenizer) -> None:
    grammar = factory.compile(json_schema({"type": "object"}))
    for text in ('{"a":1,"b":[]}', '{ "a" : 1 ,\n\t"b" : [ ] }', "{" + " " * MAX_WHITESPACE + "}"):
        assert follows(grammar, tokenizer, text)
    for text in ("{" + " " * (MAX_WHITESPACE + 1) + "}", ' {"a":1}', '{"a":1} '):
        assert not follows(grammar, tokenizer, text)


def test_a_schema_cannot_loosen_json_by_options_of_its_own(factory: GrammarFactory, tokenizer: Tokenizer) -> None:
    loose = {"type": "array", "x-guidance": {"item_separator": ";", "whitespace_pattern": "x", "lenient": True}}
    grammar = factory.compile(json_schema(loose))
    assert follows(grammar, tokenizer, "[1, 2]")
    assert not follows(grammar, tokenizer, "[1;2]") and not follows(grammar, tokenizer, "[1x,2]")
    with pytest.raises(InvalidRequest, match="not"):
        factory.compile(json_schema(loose | {"not": {"type": "null"}}))


def test_properties_come_in_the_order_of_the_schema(factory: GrammarFactory, tokenizer: Tokenizer) -> None:
    schema = {"type": "object", "properties": {"b": {}, "a": {}}, "required": ["a", "b"]}
    grammar = factory.compile(json_schema(schema))
    assert follows(grammar, tokenizer, '{"b": 1, "a": 2}')
    assert not follows(grammar, tokenizer, '{"a": 1, "b": 2}')


def test_a_state_that_was_given_an_answer_goes_on_where_it_ended(
    factory: GrammarFactory, tokenizer: Tokenizer, closing: Tensor
) -> None:
    grammar = factory.compile(json_schema(PERSON))
    state = grammar.start()
    token_ids = generate(state, 5, closing, max_tokens=15)
    assert torch.equal(allowed(after(token_ids, grammar.start())), allowed(state))


def test_states_of_one_grammar_do_not_disturb_each_other(factory: GrammarFactory, tokenizer: Tokenizer) -> None:
    grammar = factory.compile(json_schema(PERSON))
    first, second = grammar.start(), grammar.start()
    before = allowed(second)
    feed(first, tokenizer, '{"name": "Ada')
    assert torch.equal(allowed(second), before)
    assert not torch.equal(allowed(first), before)


def test_all_masks_of_a_step_equal_those_filled_alone(
    factory: GrammarFactory, tokenizer: Tokenizer, closing: Tensor
) -> None:
    specs = [json_schema(PERSON), regex("[a-z]+"), json_schema(TREE), json_schema(PERSON)]
    states = [factory.compile(spec).start() for spec in specs * 4]
    for index, state in enumerate(states):
        generate(state, index, closing, max_tokens=index)
    alone = [allowed(state) for state in states]
    prefetch(states, VOCAB_SIZE)
    for state, expected in zip(states, alone, strict=True):
        assert torch.equal(allowed(state), expected)


def test_one_failed_state_leaves_the_others_their_masks(factory: GrammarFactory, tokenizer: Tokenizer) -> None:
    stuck = feed(factory.compile(lark('start: "x" a\na: b\nb: a')).start(), tokenizer, "x")
    sound = factory.compile(regex("[a-z]+")).start()
    expected = allowed(sound)
    prefetch([stuck, sound], VOCAB_SIZE)
    assert torch.equal(allowed(sound), expected)
    assert not stuck.done
    with pytest.raises(GrammarFailed, match="no token can follow"):
        allowed(stuck)


def test_a_token_that_does_not_fit_fails_the_answer_and_is_not_named(
    factory: GrammarFactory, tokenizer: Tokenizer
) -> None:
    state = factory.compile(regex("ab")).start()
    with pytest.raises(GrammarFailed) as caught:
        feed(state, tokenizer, "secret")
    assert "secret" not in str(caught.value) and "sec" not in str(caught.value)
    assert not state.done


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
    unknown = GrammarFactory(tmp_path, vocab_size=VOCAB_SIZE, eos_token_ids=EOS)
    missing = GrammarFactory(tmp_path / "none", vocab_size=VOCAB_SIZE, eos_token_ids=EOS)
    too_small = GrammarFactory(DEMO, vocab_size=10, eos_token_ids=EOS)
    endless = GrammarFactory(DEMO, vocab_size=VOCAB_SIZE, eos_token_ids=())
    for factory, problem in (
        (unknown, "tokenizer.json is of another kind"),
        (missing, "tokenizer.json is of another kind"),
        (too_small, "tokenizer.json is of another kind"),
        (endless, "no end-of-sequence id"),
    ):
        factory.prepare()
        with pytest.raises(InvalidRequest, match=problem):
            factory.compile(regex("a"))


def test_threads_compile_and_walk_one_grammar_at_once(factory: GrammarFactory, closing: Tensor) -> None:
    fresh = GrammarFactory(DEMO, vocab_size=VOCAB_SIZE, eos_token_ids=EOS)
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
    """Threads that run Python keep the interpreter's lock until they give it up, for as long as a test lasts."""
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
