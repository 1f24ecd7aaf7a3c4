"""What clients may ask of an answer's form: what is refused on sight, and what only a trial finds."""

import asyncio
import json
import resource
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer

import workers.sampling.grammar
from orchestrator.gateway.errors import Overloaded, ReplicaFault, ReplicaUnavailable
from orchestrator.gateway.model import ServedModel, longest_token_bytes
from orchestrator.gateway.request import structured_probe, structured_trial
from orchestrator.gateway.request.structured import check_structured
from orchestrator.gateway.request.structured_probe import GrammarProbe
from orchestrator.model_dir.default_sampling import DefaultSampling
from placement.errors import InvalidRequest
from placement.model.hf import read_model_spec
from placement.model.specs import DType
from placement.serving.grammar import MAX_SOURCE_BYTES
from protos.heterodyne.v1 import inference_pb2 as pb
from protos.heterodyne.worker.v1 import worker_pb2
from tests.support.clocks import PATIENCE_S, until
from workers.sampling.grammar import GrammarSpec

# What may come next after "{" is any of 2000 names, which is more than the parser follows at once.
MANY_OPTIONAL = {"type": "object", "properties": {f"p{index}": {} for index in range(2000)}}
DEMO = Path(__file__).parents[4] / "deploy" / "demo"


@pytest.fixture(scope="module")
def model() -> ServedModel:
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    return ServedModel(
        name="demo",
        spec=read_model_spec(json.loads((DEMO / "config.json").read_text())),
        dtype=DType.BFLOAT16,
        max_context_tokens=2048,
        tokenizer=tokenizer,
        max_token_bytes=longest_token_bytes(tokenizer),
        defaults=DefaultSampling(),
        directory=DEMO,
    )


@pytest.fixture
async def probe(model: ServedModel) -> AsyncIterator[GrammarProbe]:
    probe = GrammarProbe(model)
    yield probe
    await probe.close()


def asked(**format: str) -> pb.StructuredOutput:
    return pb.StructuredOutput(**format)


def schema_of(schema: object) -> worker_pb2.Grammar:
    return worker_pb2.Grammar(json_schema=json.dumps(schema))


def refused(message: pb.StructuredOutput, model: ServedModel) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        check_structured(message, model)
    assert len(str(caught.value)) < 600
    return caught.value


# -- on sight ---------------------------------------------------------------------------------------------------------


def test_a_request_that_asks_nothing_has_no_grammar(model: ServedModel) -> None:
    assert check_structured(pb.StructuredOutput(), model) is None
    assert check_structured(pb.GenerateRequest().structured_output, model) is None


def test_each_format_is_sent_on_as_the_workers_call_it(model: ServedModel) -> None:
    assert check_structured(asked(regex="a+ "), model) == worker_pb2.Grammar(regex="a+ ")
    assert check_structured(asked(grammar='start: "a"'), model) == worker_pb2.Grammar(lark='start: "a"')
    text = '{ "type": "object",\n "properties": {"grüße": {}, "a": {"minimum": 1.50}} }'
    found = check_structured(asked(json_schema=text), model)
    # Properties keep their order: it is the order of the answer.
    assert found == worker_pb2.Grammar(json_schema='{"type":"object","properties":{"grüße":{},"a":{"minimum":1.5}}}')


@pytest.mark.parametrize("anything", ["{}", "true", ' { "x-note" : 1 } '])
def test_schemas_that_allow_any_json_are_taken(anything: str, model: ServedModel) -> None:
    found = check_structured(asked(json_schema=anything), model)
    assert found is not None and json.loads(found.json_schema).get("type") is None


def test_schemas_of_common_tools_are_taken(model: ServedModel) -> None:
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Order",
        "description": "as pydantic writes it",
        "type": "object",
        "properties": {
            "not": {"type": "string", "default": "a property may have the name of a keyword", "examples": [1e999]},
            "item": {"$ref": "#/$defs/Item"},
            "price": {"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "null"}], "default": None},
            "x": {"enum": ["a", 1, None, {"not": "a value may have it too"}], "deprecated": True},
        },
        "required": ["item"],
        "additionalProperties": False,
        "$defs": {"Item": {"type": "object", "properties": {"id": {"type": "integer", "minimum": 0}}}},
    }
    text = json.dumps(schema).replace("Infinity", "1e300")
    assert check_structured(asked(json_schema=text), model) is not None


@pytest.mark.parametrize("kind", ["json_schema", "regex", "grammar"])
def test_empty_and_overlong_sources_are_refused(kind: str, model: ServedModel) -> None:
    for source, problem in (("", "is empty"), ("ü" * (MAX_SOURCE_BYTES // 2 + 1), "is too long")):
        error = refused(asked(**{kind: source}), model)
        assert (error.field, error.problem) == (f"structured_output.{kind}", problem)


def test_a_model_that_cannot_end_takes_no_grammar(model: ServedModel) -> None:
    endless = replace(model, spec=replace(model.spec, eos_token_ids=()))
    assert "no end-of-sequence id" in refused(asked(regex="a"), endless).problem


def test_what_a_client_wrote_is_not_repeated_in_an_error(model: ServedModel) -> None:
    for message in (asked(json_schema='"' + "secret " * 50 + '"'), asked(grammar="{" + "secret " * 50)):
        assert "secret" not in str(refused(message, model))


def test_a_trial_compiles_as_the_workers_do(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, object]] = []

    class Recording:
        @staticmethod
        def grammar_from_json_schema(source: str, *, overrides: dict[str, object]) -> str:
            seen.append(dict(overrides))
            return source

    for module in (workers.sampling.grammar, structured_trial):
        monkeypatch.setattr(module, "LLMatcher", Recording)
    workers.sampling.grammar._llguidance_source(GrammarSpec(kind="json_schema", source="{}"))
    structured_trial._source({"id": 1, "kind": "json_schema", "source": "{}"})
    assert seen[0] == seen[1]


def test_a_trial_may_take_little_more_memory_than_it_begins_with() -> None:
    with open("/proc/self/statm") as statm:
        size = int(statm.read().split()[0]) * resource.getpagesize()
    assert 0 <= structured_trial._address_bytes() - size - 256 * 2**20 < 16 * 2**20


def test_the_librarys_own_formats_are_no_lark(model: ServedModel) -> None:
    source = ' {"grammars": [{"json_schema": {"const": -9223372036854775808}}]}'
    assert refused(asked(grammar=source), model).problem == "is not in the Lark syntax"


# -- on trial ---------------------------------------------------------------------------------------------------------


async def problem_of(probe: GrammarProbe, grammar: worker_pb2.Grammar) -> str | None:
    try:
        await probe.check(grammar)
    except InvalidRequest as error:
        assert error.field.startswith("structured_output.") and len(str(error)) < 900
        return error.problem
    return None


async def test_the_process_reads_the_tokenizer_by_itself(model: ServedModel) -> None:
    in_memory, lost = replace(model, directory=None), replace(model, directory=DEMO / "missing")
    assert len(structured_probe._setup(model)) < 1000 < len(structured_probe._setup(in_memory))
    for served, problem in ((model, None), (in_memory, None), (lost, "cannot be followed with this model's tokenizer")):
        probe = GrammarProbe(served)
        try:
            assert await problem_of(probe, worker_pb2.Grammar(regex="[a-z]+")) == problem
        finally:
            await probe.close()


async def test_an_end_that_was_asked_for_is_not_told(model: ServedModel, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    probe = GrammarProbe(model)
    await probe.check(worker_pb2.Grammar(regex="a+"))
    process = probe._process
    assert process is not None
    await probe.close()
    assert process.returncode is not None and not caplog.messages


async def test_grammars_that_compile_pass(probe: GrammarProbe) -> None:
    for grammar in (
        schema_of({}),
        schema_of({"type": "object", "properties": {"a": {"type": "array", "items": {"$ref": "#"}}}}),
        schema_of({"enum": [f"value {index}" for index in range(2000)]}),
        worker_pb2.Grammar(regex=r"\d{4}-\d{2}|[a-z]{1,100000}"),
        worker_pb2.Grammar(lark='start: "a" rest\nrest: /[0-9]+/ | %json {"type": "object"}'),
        worker_pb2.Grammar(lark='start: "a" <|end_of_text|>'),
    ):
        assert await problem_of(probe, grammar) is None


async def test_grammars_that_do_not_compile_are_refused_with_the_reason(probe: GrammarProbe) -> None:
    for grammar, problem in (
        (worker_pb2.Grammar(regex="("), "does not compile: unclosed group"),
        (worker_pb2.Grammar(regex="(?=a)b"), "look-around"),
        (worker_pb2.Grammar(regex=r"[^\x00-\x{10FFFF}]"), "comes to a point where no token fits"),
        (worker_pb2.Grammar(lark="start: missing"), "unknown name"),
        (worker_pb2.Grammar(lark='start: "x" a\na: b\nb: a'), "comes to a point where no token fits"),
        (worker_pb2.Grammar(lark='start: "a" <|missing|>'), "unknown special token"),
        (schema_of({"type": "object", "properties": {"a": {"not": {}}}}), 'Unimplemented keys: ["not"]'),
        (schema_of({"type": "string", "format": "password"}), "Unknown format"),
        (schema_of({"oneOf": [{"type": "string"}, {"minLength": 2}]}), "oneOf"),
        (schema_of(MANY_OPTIONAL), "cannot be followed: Parser Error"),
        (worker_pb2.Grammar(json_schema='{}}, {"lark_grammar": "start: /x/"'), "trailing characters"),
    ):
        assert problem in (await problem_of(probe, grammar) or "")


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        (worker_pb2.Grammar(lark=f"start: missing_{'x' * 4000}"), "unknown name"),
        (schema_of({"type": "string", "format": "secret\n\x1b[31m" * 400}), "Unknown format: secret"),
        (schema_of({"$ref": f"#/{'secret ' * 800}"}), "unexpected character at index 8"),
    ],
)
async def test_what_the_library_quotes_of_a_grammar_is_cut_to_one_printable_line(
    grammar: worker_pb2.Grammar, words: str, probe: GrammarProbe
) -> None:
    problem = await problem_of(probe, grammar) or ""
    assert words in problem and len(problem) < 220 and problem.isprintable()


def test_the_way_to_a_schema_is_printable_and_not_endless(model: ServedModel) -> None:
    schema: object = {"misspelt\n": 1}
    for _ in range(20):
        schema = {"properties": {"secret\x1b[31m\n" * 10: schema}}
    problem = refused(asked(json_schema=json.dumps(schema)), model).problem
    assert problem.isprintable() and problem.endswith("that answers would not be held to")


@pytest.mark.parametrize(
    ("grammar", "problem"),
    [
        # Overflows the library's stack.
        (worker_pb2.Grammar(lark='start: %json {"const": -9223372036854775807}'), "more than the compiler can take"),
        # Compares each pattern with each other one, for minutes.
        (schema_of({"patternProperties": {f"^{i}[a-z]*$": {} for i in range(600)}}), "takes too long to compile"),
        # Takes a second for the first token.
        (worker_pb2.Grammar(regex="(x{1000}){1000}"), ""),
    ],
)
async def test_grammars_that_harm_the_compiler_are_refused_and_harm_nothing_else(
    grammar: worker_pb2.Grammar, problem: str, probe: GrammarProbe
) -> None:
    harm = asyncio.create_task(problem_of(probe, grammar))
    await asyncio.sleep(0)
    assert await problem_of(probe, worker_pb2.Grammar(regex="[a-z]+")) is None
    found = await harm
    assert found is not None and problem in found
    assert await problem_of(probe, worker_pb2.Grammar(regex="[0-9]+")) is None


async def test_what_was_tried_is_remembered(probe: GrammarProbe, monkeypatch: pytest.MonkeyPatch) -> None:
    sound, broken = schema_of({"type": "object"}), worker_pb2.Grammar(regex="(")
    first = [await problem_of(probe, grammar) for grammar in (sound, broken)]
    await probe.close()
    monkeypatch.setattr(probe, "_running", None)  # no process takes part
    again = [await problem_of(probe, grammar) for grammar in (sound, broken) for _ in range(100)]
    assert again[::100] == first and first[0] is None


async def test_a_request_that_leaves_frees_no_place_while_its_trial_goes_on(probe: GrammarProbe) -> None:
    await probe.check(worker_pb2.Grammar(regex="a"))
    hangs = [schema_of({"patternProperties": {f"^{i}[a-z]*{n}$": {} for i in range(600)}}) for n in range(6)]
    waiting = [asyncio.create_task(problem_of(probe, hang)) for hang in hangs]
    await until(lambda: len(probe._waiting) == 2)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    sound = asyncio.create_task(problem_of(probe, worker_pb2.Grammar(regex="b")))
    done, _ = await asyncio.wait({sound}, timeout=0.5)
    assert not done, "the two that had begun hold their places"
    # Those that had not begun are tried no more: the two take their 3 s of the processor, then it is the turn of this.
    assert await asyncio.wait_for(sound, PATIENCE_S) is None


async def test_equal_grammars_at_once_share_one_trial(probe: GrammarProbe) -> None:
    await probe.check(worker_pb2.Grammar(regex="a"))  # the process has read the tokenizer
    # More than places and queue together.
    problems = await asyncio.gather(*(problem_of(probe, worker_pb2.Grammar(regex="(")) for _ in range(200)))
    assert len(set(problems)) == 1 and problems[0] is not None


async def test_more_grammars_than_can_wait_are_refused_at_once(probe: GrammarProbe) -> None:
    asking = (problem_of(probe, worker_pb2.Grammar(regex=f"number {index}")) for index in range(200))
    outcomes = await asyncio.gather(*asking, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {type(None), Overloaded}
    assert outcomes.count(None) == 66


async def test_a_process_that_never_works_is_not_started_for_ever(
    probe: GrammarProbe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    for index in range(5):
        with pytest.raises(ReplicaUnavailable, match="send it again"):
            await probe.check(worker_pb2.Grammar(regex=f"a{index}"))
    with pytest.raises(ReplicaFault, match="structured output is off"):
        await probe.check(worker_pb2.Grammar(regex="b"))


async def test_many_grammars_at_once_each_get_their_verdict(probe: GrammarProbe) -> None:
    grammars = [worker_pb2.Grammar(regex=f"{'(' if index % 3 == 0 else ''}number {index}") for index in range(24)]
    problems = await asyncio.gather(*(problem_of(probe, grammar) for grammar in grammars))
    assert [problem is not None for problem in problems] == [index % 3 == 0 for index in range(24)]


async def test_a_lost_process_fails_who_waits_and_is_replaced(probe: GrammarProbe) -> None:
    await probe.check(worker_pb2.Grammar(regex="a"))
    waiting = asyncio.create_task(
        probe.check(schema_of({"patternProperties": {f"^{i}[a-z]*$": {} for i in range(600)}}))
    )
    await until(lambda: len(probe._waiting) == 1)
    await probe.close()
    with pytest.raises(ReplicaUnavailable, match="send it again"):
        await waiting
    await probe.check(worker_pb2.Grammar(regex="b"))


async def test_a_tokenizer_that_cannot_be_followed_refuses_every_grammar(model: ServedModel) -> None:
    probe = GrammarProbe(replace(model, spec=replace(model.spec, vocab_size=10)))
    try:
        assert "this model's tokenizer" in (await problem_of(probe, worker_pb2.Grammar(regex="a")) or "")
    finally:
        await probe.close()
