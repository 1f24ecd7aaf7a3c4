"""Checks that the answers of a model with random logits match their grammars."""

import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from tokenizers import Tokenizer
from torch import Tensor

from placement.errors import InvalidRequest
from placement.serving.grammar import MAX_WHITESPACE, WHITESPACE_OPTION
from tests.support.grammars import (
    DEMO,
    EOS,
    LARK,
    MAX_TOKENS,
    PERSON,
    REGEXES,
    SCHEMAS,
    TREE,
    VOCAB_SIZE,
    after,
    allowed,
    feed,
    follows,
    generate,
    grammar_factory,
    json_schema,
    lark,
    regex,
    text_of,
)
from workers.sampling.grammar import (
    GrammarFactory,
    GrammarFailed,
    prefetch,
)
from workers.sampling.sampling import SampledToken, SamplerState, SamplingParams, sample


@pytest.fixture(scope="module")
def factory() -> GrammarFactory:
    return grammar_factory(DEMO, vocab_size=VOCAB_SIZE, eos_token_ids=EOS)


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
    assert not allowed(feed(state, tokenizer, '{"a":[1,2'))[list(EOS)].any()


def test_special_and_padding_tokens_are_never_allowed(factory: GrammarFactory, tokenizer: Tokenizer) -> None:
    state = feed(factory.compile(json_schema({"type": "string"})).start(), tokenizer, '"')
    assert allowed(state).sum() > 3000
    assert not allowed(state)[[*EOS, *range(tokenizer.get_vocab_size(), VOCAB_SIZE)]].any()


def test_json_is_compact_by_default(factory: GrammarFactory, tokenizer: Tokenizer) -> None:
    for options in ({}, {"x-guidance": {WHITESPACE_OPTION: False}}):
        grammar = factory.compile(json_schema({"type": "object", **options}))
        assert follows(grammar, tokenizer, '{"a":1,"b":[]}')
        for text in ('{ "a":1}', '{"a" :1}', '{"a": 1}', '{"a":1 }', '{"a":1, "b":[]}', '{"a":[\n]}'):
            assert not follows(grammar, tokenizer, text)


def test_whitespace_in_json_is_free_but_bounded_where_it_is_asked_for(
    factory: GrammarFactory, tokenizer: Tokenizer
) -> None:
    grammar = factory.compile(json_schema({"type": "object", "x-guidance": {WHITESPACE_OPTION: True}}))
    for text in ('{"a":1,"b":[]}', '{ "a" : 1 ,\n\t"b" : [ ] }', "{" + " " * MAX_WHITESPACE + "}"):
        assert follows(grammar, tokenizer, text)
    for text in ("{" + " " * (MAX_WHITESPACE + 1) + "}", ' {"a":1}', '{"a":1} '):
        assert not follows(grammar, tokenizer, text)


def test_a_schema_cannot_loosen_json_by_options_of_its_own(factory: GrammarFactory, tokenizer: Tokenizer) -> None:
    loose = {"type": "array", "x-guidance": {"item_separator": ";", "whitespace_pattern": "x", "lenient": True}}
    grammar = factory.compile(json_schema(loose))
    assert follows(grammar, tokenizer, "[1,2]")
    assert not follows(grammar, tokenizer, "[1;2]") and not follows(grammar, tokenizer, "[1x,2]")
    with pytest.raises(InvalidRequest, match="not"):
        factory.compile(json_schema(loose | {"not": {"type": "null"}}))


def test_properties_come_in_the_order_of_the_schema(factory: GrammarFactory, tokenizer: Tokenizer) -> None:
    schema = {"type": "object", "properties": {"b": {}, "a": {}}, "required": ["a", "b"]}
    grammar = factory.compile(json_schema(schema))
    assert follows(grammar, tokenizer, '{"b":1,"a":2}')
    assert not follows(grammar, tokenizer, '{"a":1,"b":2}')


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
    feed(first, tokenizer, '{"name":"Ada')
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
