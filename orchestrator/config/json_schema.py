"""Owns the JSON Schema of the cluster YAML, which editors complete and check from."""

import json
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from orchestrator.config.document import ADAPTER
from orchestrator.config.types import Address


class _Schema(GenerateJsonSchema):
    """Writes addresses as the YAML does, and no titles, as they would repeat the keys."""

    def encode_default(self, dft: Any) -> Any:
        return str(dft) if isinstance(dft, Address) else super().encode_default(dft)

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def schema_text() -> str:
    """Returns the schema as it is committed in ``deploy/heterodyne.schema.json``: the same text for the same code."""
    schema = ADAPTER.json_schema(schema_generator=_Schema)
    schema = {"$schema": GenerateJsonSchema.schema_dialect, **schema, "title": "Heterodyne cluster YAML"}
    return json.dumps(schema, indent=2) + "\n"
