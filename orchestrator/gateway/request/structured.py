"""Checks a client's structured_output, as far as that needs no grammar compiler. Pure.

A grammar is a program that the client wrote, and it can make the library that compiles it hang or crash. What else must
be found out is therefore tried in a process of its own (structured_probe), never in the gateway's.
"""

from orchestrator.brief import brief
from orchestrator.gateway.model import ServedModel
from orchestrator.gateway.request.shown import shown
from orchestrator.gateway.request.structured_schema import normalize_schema
from placement.errors import InvalidRequest
from placement.serving.grammar import ENDS_TOO_SOON, MAX_SOURCE_BYTES
from protos.heterodyne.v1 import inference_pb2 as pb
from protos.heterodyne.worker.v1 import worker_pb2


def check_structured(message: pb.StructuredOutput, model: ServedModel) -> worker_pb2.Grammar | None:
    """Returns what ``message`` asks of the answer, as workers are told it, or None where it asks nothing.

    A JSON Schema is sent on as JSON text of one form: ``{}`` is any JSON value, ``{"type": "object"}`` any object.

    Raises:
        InvalidRequest: names the field, what is wrong and what to do.
    """
    kind = message.WhichOneof("format")
    if kind is None:
        return None
    source: str = getattr(message, kind)
    _check_source(f"structured_output.{kind}", source, model)
    if kind == "json_schema":
        schema = normalize_schema(source)
        _check_source("structured_output.json_schema", schema, model)  # its numbers may be written longer
        return worker_pb2.Grammar(json_schema=schema)
    if kind == "regex":
        return worker_pb2.Grammar(regex=source)
    if source.lstrip().startswith("{"):
        # The library would take it for one of its own formats, in which nothing is checked here.
        raise InvalidRequest(
            field="structured_output.grammar",
            value=shown(source),
            problem="is not in the Lark syntax",
            fix='Send rules such as \'start: "yes" | "no"\', or a JSON Schema in json_schema.',
        )
    return worker_pb2.Grammar(lark=source)


def cannot_be_followed(grammar: worker_pb2.Grammar, problem: str) -> InvalidRequest:
    """Returns the error for a grammar that a replica cannot follow, at its beginning or further on.

    Args:
        problem: what the replica says of it, in a clause.
    """
    kind = grammar.WhichOneof("format")
    fix = "Send a simpler or a corrected one, such as one with fewer or smaller repetitions."
    if problem.endswith(ENDS_TOO_SOON):
        fix = "Lower min_tokens, or send one that allows a longer answer."
    return InvalidRequest(
        field="structured_output",
        value=shown(getattr(grammar, kind)) if kind else "",
        problem=f"cannot be followed: {brief(problem)}",
        fix=fix,
    )


def _check_source(field: str, source: str, model: ServedModel) -> None:
    if not source:
        raise InvalidRequest(
            field=field,
            value=shown(source),
            problem="is empty",
            fix="Write it, or leave structured_output out.",
        )
    if len(source.encode()) > MAX_SOURCE_BYTES:
        raise InvalidRequest(
            field=field,
            value=f"{len(source.encode())} bytes",
            problem="is too long",
            fix=f"Send at most {MAX_SOURCE_BYTES} bytes.",
        )
    if not model.spec.eos_token_ids:
        raise InvalidRequest(
            field=field,
            value=shown(source),
            problem="cannot be enforced: this model has no end-of-sequence id",
            fix="Leave structured_output out.",
        )
