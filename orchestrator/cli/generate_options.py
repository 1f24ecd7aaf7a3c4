"""Owns the options of ``generate``: how each is written, and what its value becomes in the request."""

import errno
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from protos.heterodyne.v1 import inference_pb2 as pb

# The most that the fields of the protocol hold.
_INT32, _UINT64 = 2**31 - 1, 2**64 - 1

Prompt = Annotated[str, typer.Argument(help="text to continue; - reads standard input")]
Chat = Annotated[bool, typer.Option("--chat", help="the prompt is what a user says to the assistant")]
System = Annotated[str | None, typer.Option(help="with --chat: what the assistant is told first")]
MaxTokens = Annotated[
    int | None, typer.Option(min=0, max=_INT32, help="most tokens; default: until the model ends; 0 with --echo")
]
MinTokens = Annotated[int, typer.Option(min=0, max=_INT32, help="generate at least this many tokens")]
NumChoices = Annotated[int, typer.Option("--n", min=1, max=64, help="how many continuations")]
Temperature = Annotated[float | None, typer.Option(min=0.0, max=100.0, help="0 is greedy")]
TopK = Annotated[int | None, typer.Option(min=0, max=_INT32, help="0 is all tokens")]
TopP = Annotated[float | None, typer.Option(min=0.0, max=1.0, help="1 is all tokens")]
MinP = Annotated[float | None, typer.Option(min=0.0, max=1.0, help="0 is all tokens")]
RepetitionPenalty = Annotated[float | None, typer.Option(min=0.01, max=100.0, help="1 is none")]
Penalty = Annotated[float | None, typer.Option(min=-2.0, max=2.0, help="0 is none")]
LogitBias = Annotated[list[str], typer.Option(metavar="ID=VALUE", help="may be repeated")]
Seed = Annotated[int | None, typer.Option(min=0, max=_UINT64, help="draws the same answer again")]
Stop = Annotated[list[str], typer.Option(help="end before this text; may be repeated")]
JsonSchema = Annotated[str | None, typer.Option(metavar="FILE|TEXT", help="the answer is JSON of this schema")]
Regex = Annotated[str | None, typer.Option(help="the answer matches this regular expression")]
Grammar = Annotated[str | None, typer.Option(metavar="FILE|TEXT", help="... this grammar in Lark's syntax")]
Echo = Annotated[bool, typer.Option("--echo", help="show the prompt too")]
Logprobs = Annotated[int | None, typer.Option(min=0, max=20, help="show log-probabilities and as many alternatives")]
CacheSalt = Annotated[str, typer.Option(help="share cached prefixes with this salt only")]
TimeoutS = Annotated[float, typer.Option("--timeout", min=0.001, max=86400.0, help="seconds")]


def checked_max_tokens(max_tokens: int | None, *, echo: bool) -> int | None:
    """Returns ``max_tokens``; refuses a request that asks for nothing at all."""
    if max_tokens == 0 and not echo:
        raise typer.BadParameter("0 is for --echo, which shows the prompt.", param_hint="--max-tokens")
    return max_tokens


def set_input(request: pb.GenerateRequest, prompt: str, *, chat: bool, system: str | None) -> None:
    """Sets what the request continues: text, standard input for ``-``, or either as what a user says."""
    text = _standard_input() if prompt == "-" else prompt
    if system is not None and not chat:
        raise typer.BadParameter("It goes with --chat.", param_hint="--system")
    if not chat:
        request.prompt = text
        return
    if system is not None:
        request.chat.messages.add(role="system", content=system)
    request.chat.messages.add(role="user", content=text)


def _standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        problem = f"Standard input is not UTF-8: {error.reason} at byte {error.start}."
        raise typer.BadParameter(problem, param_hint="PROMPT") from None


def biases(texts: Iterable[str]) -> list[pb.LogitBias]:
    """Reads biases that are written as ID=VALUE each."""
    return [_bias(text) for text in texts]


def _bias(text: str) -> pb.LogitBias:
    token_id, _, bias = text.partition("=")
    try:
        return pb.LogitBias(token_id=int(token_id), bias=float(bias))
    except ValueError:
        problem = f"{text!r} is not ID=VALUE, as 42=-1.5 is."
        raise typer.BadParameter(problem, param_hint="--logit-bias") from None


def structured(json_schema: str | None, regex: str | None, grammar: str | None) -> pb.StructuredOutput | None:
    """Returns what the answer must match; at most one of the three may be given."""
    given = {"--json-schema": json_schema, "--regex": regex, "--grammar": grammar}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise typer.BadParameter("An answer can match one of them.", param_hint=" and ".join(names))
    if json_schema is not None:
        return pb.StructuredOutput(json_schema=_file_or_text(json_schema, "--json-schema", mark="{"))
    if grammar is not None:
        return pb.StructuredOutput(grammar=_file_or_text(grammar, "--grammar", mark=":"))
    return None if regex is None else pb.StructuredOutput(regex=regex)


def _file_or_text(value: str, option: str, *, mark: str) -> str:
    """Returns what the file named ``value`` holds; where there is none, ``value`` itself, which must hold ``mark``."""
    try:
        if Path(value).is_file():
            return Path(value).read_text(encoding="utf-8")
        if mark in value or value.strip() == "true":
            return value
        raise FileNotFoundError(errno.ENOENT, "there is no such file")
    except (OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            return value
        raise typer.BadParameter(f"{value!r} cannot be read: {error}", param_hint=option) from None
