"""The JSON Schema that editors read."""

import json
from pathlib import Path
from typing import Any

import yaml

from orchestrator.config.json_schema import schema_text
from placement.planning.kv_size import CPU_SHARE, GPU_SHARE, SHORT_SEQUENCE_TOKENS, UNKNOWN_MEMORY_KV_BYTES
from placement.planning.memory import size_words

COMMITTED = Path("deploy/heterodyne.schema.json")


def properties(node: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [item for kind in node["$defs"].values() for item in kind["properties"].items()]


def test_committed_schema_is_current() -> None:
    assert COMMITTED.read_text() == schema_text(), "run: python -m orchestrator schema > deploy/heterodyne.schema.json"


def test_every_key_is_described() -> None:
    schema = json.loads(schema_text())
    assert [name for name, value in properties(schema) if not value.get("description")] == []
    assert len(properties(schema)) > 25


def test_what_auto_takes_for_kv_blocks_is_described_as_it_is() -> None:
    described = dict(properties(json.loads(schema_text())))["kv_cache"]["description"]
    assert (CPU_SHARE, GPU_SHARE) == (0.5, 0.9) and "half of the memory" in described and "nine tenths of" in described
    assert size_words(UNKNOWN_MEMORY_KV_BYTES) in described and f"{SHORT_SEQUENCE_TOKENS} tokens" in described


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
