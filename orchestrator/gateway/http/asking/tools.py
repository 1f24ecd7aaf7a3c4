"""Reads which tools an answer may, or must, call. Pure."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator

from orchestrator.gateway.http.asking.body import Body, fault
from orchestrator.gateway.http.asking.common import json_text
from placement.errors import InvalidRequest
from protos.heterodyne.v1 import inference_pb2 as pb

_DEFINITIONS = "$defs"
_NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
_NAME = Field(pattern=r"^[A-Za-z0-9_.\-]{1,64}$")


class Function(Body):
    """A function that the model may call."""

    name: Annotated[str, _NAME]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool: a function, as there are no others."""

    type: Literal["function"]
    function: Function


class CalledFunction(Body):
    """A function that an assistant called."""

    name: Annotated[str, _NAME]
    arguments: str


class CalledTool(Body):
    """A call in a turn of the assistant's."""

    id: Annotated[str, Field(min_length=1, max_length=128)]
    type: Literal["function"] = "function"
    function: CalledFunction


def _choice(value: Any) -> str | tuple[str]:
    """Reads auto, none, required, or an object with the name of a function, which becomes a tuple."""
    if value in ("auto", "none", "required"):
        return str(value)
    function = value.get("function") if isinstance(value, dict) and value.get("type") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise fault(
            "is no choice of tools",
            'Use auto, none, required, or {"type": "function", "function": {"name": "…"}}.',
        )
    return (name,)


ToolChoice = Annotated[str | tuple[str], PlainValidator(_choice)]


def offered(tools: list[Tool] | None, choice: str | tuple[str] | None) -> list[Tool]:
    """Returns the tools that the model is told of. Raises InvalidRequest for a choice that cannot be."""
    if not tools:
        if choice not in (None, "none", "auto"):
            raise InvalidRequest(field="tool_choice", problem="needs tools", fix="Send tools, or leave it out.")
        return []
    names = [tool.function.name for tool in tools]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise InvalidRequest(
                field=f"tools[{index}].function.name",
                value=name,
                problem="is the name of another tool",
                fix="Give each a name of its own.",
            )
    if isinstance(choice, tuple) and choice[0] not in names:
        raise InvalidRequest(
            field="tool_choice", problem="names a function that is none of the tools", fix="Name one of them."
        )
    return [] if choice == "none" else tools


def fill_tools(
    message: pb.GenerateRequest, tools: list[Tool], choice: str | tuple[str] | None, *, several: bool
) -> None:
    """Writes into ``message`` the tools, and what a forced call must match.

    Args:
        several: whether several calls may be made at once.

    Raises:
        InvalidRequest: a call is forced, and something else too.
    """
    message.chat.tools.extend(json_text(tool.model_dump(exclude_none=True)) for tool in tools)
    if not tools or choice in (None, "auto"):
        return
    if message.HasField("structured_output"):
        raise InvalidRequest(
            field="tool_choice",
            problem="forces a call, and another form of the answer is asked for too",
            fix="Set it to auto, or leave response_format and structured_outputs out.",
        )
    if isinstance(choice, tuple):
        schema = next(_parameters(tool) for tool in tools if tool.function.name == choice[0])
    else:
        schema = _any_of(tools, several=several)
    message.structured_output.json_schema = json_text(schema)


def _parameters(tool: Tool) -> Mapping[str, Any]:
    return tool.function.parameters or _NO_PARAMETERS


def _any_of(tools: list[Tool], *, several: bool) -> dict[str, Any]:
    """Returns the schema of a list of calls. Definitions move to its root, which references start from."""
    definitions: dict[str, Any] = {}
    calls = []
    for index, tool in enumerate(tools):
        parameters = dict(_parameters(tool))
        for name, definition in (parameters.pop(_DEFINITIONS, None) or {}).items():
            if definitions.setdefault(name, definition) != definition:
                raise InvalidRequest(
                    field=f"tools[{index}].function.parameters",
                    problem="defines a schema of the same name as another tool, and not the same",
                    fix="Give one of them another name under $defs.",
                )
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": tool.function.name}, "parameters": parameters},
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
        )
    schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
    if not several:
        schema["maxItems"] = 1
    return schema | ({_DEFINITIONS: definitions} if definitions else {})
