"""Which JSON Schemas are refused on sight: what is no schema, and what answers would not be held to."""

import json
import time

import pytest

from orchestrator.gateway.request.structured_schema import MAX_INTEGER, normalize_schema
from placement.errors import InvalidRequest


def refused(text: str) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        normalize_schema(text)
    assert len(str(caught.value)) < 600
    return caught.value


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "is not JSON"),
        ("{'a': 1}", "is not JSON"),
        ('{"a": 1} {"b": 2}', "is not JSON"),
        ('{"minimum": NaN}', "NaN is no JSON number"),
        ('{"type": "object", "type": "array"}', "'type' occurs twice"),
        ('{"enum": [{"b": 1, "a": 1, "b": 2}]}', "'b' occurs twice"),
        ("[]", "is not a JSON object"),
        ("false", "is not a JSON object"),
        ('"object"', "is not a JSON object"),
        ("[" * 5000, "is nested more than"),
        ('{"items":' * 60 + "{}" + "}" * 60, "is nested more than"),
        ('{"properties": []}', "has a value at #/properties of the wrong type"),
        ('{"anyOf": {}}', "has a value at #/anyOf of the wrong type"),
        ('{"properties": {"a": 1}}', "has no schema at #/properties/a"),
        ('{"items": [{}, "x"]}', "has no schema at #/items/1"),
    ],
)
def test_what_is_no_schema_is_refused(text: str, problem: str) -> None:
    error = refused(text)
    assert error.field == "structured_output.json_schema" and problem in error.problem


@pytest.mark.parametrize(
    ("schema", "keyword", "path"),
    [
        ({"not": {}}, "not", "#"),
        ({"requierd": ["a"]}, "requierd", "#"),
        ({"type": "array", "items": {"uniqueItems": True}}, "uniqueItems", "#/items"),
        ({"properties": {"a": {"nullable": True}}}, "nullable", "#/properties/a"),
        ({"anyOf": [{}, {"if": {}}]}, "if", "#/anyOf/1"),
        ({"$defs": {"a": {"dependentRequired": {}}}}, "dependentRequired", "#/$defs/a"),
        ({"additionalProperties": {"contains": {}}}, "contains", "#/additionalProperties"),
        ({"x-guidance": {"lenient": True}}, "x-guidance", "#"),
        ({"x-guidance": {"whitespace_flexible": True, "lenient": True}}, "x-guidance", "#"),
        ({"x-guidance": {"whitespace_flexible": "yes"}}, "x-guidance", "#"),
        ({"x-guidance": True}, "x-guidance", "#"),
        ({"items": {"x-guidance": {"whitespace_flexible": True}}}, "x-guidance", "#/items"),
    ],
)
def test_keywords_that_would_be_ignored_are_refused(schema: dict[str, object], keyword: str, path: str) -> None:
    error = refused(json.dumps(schema))
    assert error.value == keyword and f"at {path} that" in error.problem


def test_white_space_is_the_clients_to_choose() -> None:
    schema = '{"type":"array","x-guidance":{"whitespace_flexible":true}}'
    assert normalize_schema(schema) == schema


@pytest.mark.parametrize(
    "schema",
    [
        {"const": -(2**63)},
        {"const": [{"a": 2**53}]},
        {"enum": [1, 1e300]},
        {"items": {"minimum": -(2**63)}},
        {"maximum": float(2**60)},
        {"maximum": 10**400},
        {"enum": [[-(10**4000)]]},
    ],
)
def test_numbers_that_would_not_be_exact_are_refused(schema: dict[str, object]) -> None:
    assert "too large to be exact" in refused(json.dumps(schema)).problem
    assert "too large" in refused('{"const": 1e999}').problem
    assert normalize_schema(json.dumps({"enum": [MAX_INTEGER, -MAX_INTEGER]}))


def test_a_name_that_occurs_twice_among_thousands_is_found_at_once() -> None:
    names = ",".join(f'"{index:x}":1' for index in range(6000))
    started_s = time.process_time()
    assert "occurs twice" in refused(f'{{"enum":{{{names},"0":1}}}}').problem
    assert time.process_time() - started_s < 0.5
