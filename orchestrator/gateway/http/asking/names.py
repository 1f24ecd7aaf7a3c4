"""Says what the fields of the public gRPC service are called over HTTP, for errors to name what was written. Pure."""

from collections.abc import Mapping

from placement.errors import FieldError

_COMMON = {
    "num_choices": "n",
    "structured_output.json_schema": "response_format",
    "structured_output": "response_format",
}
COMPLETION: Mapping[str, str] = {**_COMMON, "prompt_ids.ids": "prompt", "prompt_ids": "prompt"}
CHAT: Mapping[str, str] = {
    **_COMMON,
    "chat.messages": "messages",
    "chat.tools": "tools",
    "chat.template_values": "chat_template_kwargs",
    "chat": "messages",
    "prompt": "messages",
    "logprobs": "top_logprobs",
}
STRUCTURED: Mapping[str, str] = {
    "structured_output.json_schema": "structured_outputs.json",
    "structured_output.regex": "structured_outputs.regex",
    "structured_output.grammar": "structured_outputs.grammar",
    "structured_output": "structured_outputs",
}
"""The fields of a request whose grammar came in vLLM's form."""
NEWER: Mapping[str, str] = {"max_tokens": "max_completion_tokens"}
"""The fields of a chat whose client wrote the newer name."""
FORCED: Mapping[str, str] = {"structured_output.json_schema": "tools", "structured_output": "tools"}
"""The fields of a chat whose grammar is made of its tools."""
TOKENIZE: Mapping[str, str] = {"chat.messages": "messages", "chat": "messages", "text": "prompt"}
DETOKENIZE: Mapping[str, str] = {"ids": "tokens"}
_SECTION = "sampling."


def renamed(error: FieldError, names: Mapping[str, str]) -> FieldError:
    """Returns ``error`` with the field under its name over HTTP."""
    name, bracket, rest = error.field.removeprefix(_SECTION).partition("[")
    if name == "logit_bias":  # an object there, with no places that could be counted
        bracket = rest = ""
    fix = error.fix
    for old, new in names.items():
        if "_" in old:  # else it is an English word too
            fix = fix.replace(old, new)
    return type(error)(
        field=f"{names.get(name, name)}{bracket}{rest}", value=error.value, problem=error.problem, fix=fix
    )
