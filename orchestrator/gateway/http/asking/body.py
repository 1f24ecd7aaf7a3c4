"""Reads a JSON body as a typed object, and says which field is wrong and why. Pure."""

import difflib
from collections.abc import Sequence
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from orchestrator.brief import brief
from placement.errors import InvalidRequest

MAX_BODY_BYTES = 8 << 20  # as much as the gRPC service takes in one message

Int32 = Annotated[int, Field(ge=-(2**31), le=2**31 - 1)]
TokenId = Annotated[int, Field(ge=0, le=2**32 - 1)]


class Body(BaseModel):
    """A JSON object whose keys are all known: what would be ignored is refused instead."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


AnyBody = TypeVar("AnyBody", bound=Body)


def read_body(kind: type[AnyBody], data: bytes) -> AnyBody:
    """Returns the object that ``data`` holds.

    Raises:
        InvalidRequest: it is no JSON, or a field is unknown or has a value that it cannot have; it repeats no text.
    """
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise _refusal(kind, error.errors(include_url=False)[0]) from None


def fault(problem: str, fix: str) -> PydanticCustomError:
    """Returns the error that a validator raises for a value."""
    return PydanticCustomError("refused", "{problem}", {"problem": problem, "fix": fix})


def _refusal(kind: type[Body], error: ErrorDetails) -> InvalidRequest:
    if error["type"] == "json_invalid":
        problem = brief(f"is not JSON: {error.get('ctx', {}).get('error', '')}")
        return InvalidRequest(field="body", problem=problem, fix="Send one JSON object.")
    field = path_of(error["loc"]) or "body"
    context = error.get("ctx", {})
    match error["type"]:
        case "refused":
            return InvalidRequest(field=field, problem=str(context["problem"]), fix=str(context["fix"]))
        case "extra_forbidden":
            return InvalidRequest(field=field, problem="is not a known field", fix=_nearest(kind, error["loc"]))
        case "missing":
            return InvalidRequest(field=field, problem="is required", fix="Add it.")
    value = error["input"] if isinstance(error["input"], bool | int | float) else None
    words = error["msg"].removeprefix("Input ").removeprefix("should ")
    return InvalidRequest(field=field, value=value, problem=brief(f"should {words}"), fix="Correct it.")


def path_of(location: Sequence[int | str]) -> str:
    """Returns where in a body something is, such as ``messages[0].role``."""
    path = ""
    for step in location:
        path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else step
    return path


def _nearest(kind: type[Body], location: Sequence[int | str]) -> str:
    name = str(location[-1])
    near = difflib.get_close_matches(name, kind.model_fields, n=1) if len(location) == 1 else []
    return f"Did you mean {near[0]}?" if near else "Leave it out."
