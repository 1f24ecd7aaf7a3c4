"""The JSON Schema that editors read."""

import json
from pathlib import Path
from typing import Any

import yaml

from orchestrator.config.json_schema import schema_text

COMMITTED = Path("deploy/heterodyne.schema.json")


def properties(node: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [item for kind in node["$defs"].values() for item in kind["properties"].items()]


def test_committed_schema_is_current() -> None:
    assert COMMITTED.read_text() == schema_text(), "run: python -m orchestrator schema > deploy/heterodyne.schema.json"


def test_every_key_is_described() -> None:
    schema = json.loads(schema_text())
    assert [name for name, value in properties(schema) if not value.get("description")] == []
    assert len(properties(schema)) > 25


def test_sample_names_the_schema_and_uses_only_its_keys() -> None:
    text = Path("deploy/local.yaml").read_text()
    schema = json.loads(schema_text())
    assert text.startswith("# yaml-language-server: $schema=./heterodyne.schema.json\n")
    for section, values in yaml.safe_load(text).items():
        kind = schema["properties"][section]["$ref"].rpartition("/")[2]
        assert set(values) <= set(schema["$defs"][kind]["properties"])


def test_unknown_keys_are_errors_in_every_section() -> None:
    schema = json.loads(schema_text())
    assert all(kind["additionalProperties"] is False for kind in [schema, *schema["$defs"].values()])
