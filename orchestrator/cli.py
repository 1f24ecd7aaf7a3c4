"""The command line: serve, generate, status, timeline, schema, demo. Parses and prints; the work is done elsewhere."""

import errno
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from orchestrator.client import GenerateResult, fetch_status, stream_generate
from orchestrator.config_types import parse_address
from orchestrator.render import choice_blocks, ending, logprob_lines, print_status
from orchestrator.schema import schema_text
from orchestrator.timeline_cli import write_timeline
from placement.errors import HeterodyneError, InvalidConfig
from protos.heterodyne.v1 import inference_pb2 as pb

app = typer.Typer(
    name="python -m orchestrator",
    help="Heterodyne serves one large language model on the machines a team really has.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
DEFAULT_ADDRESS = "127.0.0.1:50051"
# The most that the fields of the protocol hold.
_INT32, _UINT64 = 2**31 - 1, 2**64 - 1
# Whether the last thing written to standard output left its line open.
_line_open = False

ConfigPath = Annotated[Path, typer.Argument(metavar="CLUSTER.YAML", help="the cluster file")]
Overrides = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="change one value of the file")]
ServiceAddress = Annotated[str, typer.Option("--address", envvar="HETERODYNE_ADDRESS", help="host:port of the service")]


@contextmanager
def _errors_in_one_line() -> Iterator[None]:
    """What a user did, or a service said, is no traceback."""
    try:
        yield
    except HeterodyneError as error:
        if _line_open:
            _write("\n")
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise typer.Exit(1) from None


@app.command()
def serve(config: ConfigPath, overrides: Overrides = []) -> None:  # noqa: B006 - typer copies it
    """Serve a model until Ctrl-C or SIGTERM, then drain."""
    # Here, because it imports Ray, which takes a second that `generate` and `status` need not wait.
    from orchestrator.serve import serve as run

    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s serve %(message)s")
    with _errors_in_one_line():
        code = run(config, overrides=overrides, console=Console())
    raise typer.Exit(code)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="text to continue; - reads standard input")],
    address: ServiceAddress = DEFAULT_ADDRESS,
    chat: Annotated[bool, typer.Option("--chat", help="the prompt is what a user says to the assistant")] = False,
    system: Annotated[str | None, typer.Option(help="with --chat: what the assistant is told first")] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=0, max=_INT32, help="most tokens; default: to the text's end; 0 with --echo"),
    ] = None,
    min_tokens: Annotated[int, typer.Option(min=0, max=_INT32, help="no end of text before as many")] = 0,
    n: Annotated[int, typer.Option("--n", min=1, max=64, help="how many continuations")] = 1,
    temperature: Annotated[float | None, typer.Option(min=0.0, max=100.0, help="0 is greedy")] = None,
    top_k: Annotated[int | None, typer.Option(min=0, max=_INT32, help="0 is all tokens")] = None,
    top_p: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="1 is all tokens")] = None,
    min_p: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="0 is all tokens")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(min=0.01, max=100.0, help="1 is none")] = None,
    presence_penalty: Annotated[float | None, typer.Option(min=-2.0, max=2.0, help="0 is none")] = None,
    frequency_penalty: Annotated[float | None, typer.Option(min=-2.0, max=2.0, help="0 is none")] = None,
    logit_bias: Annotated[list[str], typer.Option(metavar="ID=VALUE", help="may be repeated")] = [],  # noqa: B006
    seed: Annotated[int | None, typer.Option(min=0, max=_UINT64, help="draws the same answer again")] = None,
    stop: Annotated[list[str], typer.Option(help="end before this text; may be repeated")] = [],  # noqa: B006
    json_schema: Annotated[
        str | None, typer.Option(metavar="FILE|TEXT", help="the answer is JSON of this schema")
    ] = None,
    regex: Annotated[str | None, typer.Option(help="the answer matches this regular expression")] = None,
    grammar: Annotated[str | None, typer.Option(metavar="FILE|TEXT", help="... this grammar in Lark's syntax")] = None,
    echo: Annotated[bool, typer.Option("--echo", help="show the prompt too")] = False,
    logprobs: Annotated[
        int | None, typer.Option(min=0, max=20, help="show log-probabilities and as many alternatives")
    ] = None,
    cache_salt: Annotated[str, typer.Option(help="share cached prefixes with this salt only")] = "",
    timeout_s: Annotated[float, typer.Option("--timeout", min=0.001, max=86400.0, help="seconds")] = 600.0,
) -> None:
    """Continue a prompt; the answer streams to standard output, the figures to standard error."""
    if max_tokens == 0 and not echo:
        raise typer.BadParameter("0 is for --echo, which shows the prompt.", param_hint="--max-tokens")
    request = pb.GenerateRequest(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        num_choices=n,
        stop=stop,
        echo=echo,
        logprobs=logprobs,
        cache_salt=cache_salt,
        sampling=pb.SamplingParams(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            logit_bias=[_bias(text) for text in logit_bias],
            seed=seed,
        ),
        structured_output=_structured(json_schema, regex, grammar),
    )
    _set_input(request, _standard_input() if prompt == "-" else prompt, chat=chat, system=system)
    with _errors_in_one_line():
        check_address(address)
        result = stream_generate(address, request, timeout_s=timeout_s, on_text=_write)
    _show(result, logprobs=logprobs is not None)


def _show(result: GenerateResult, *, logprobs: bool) -> None:
    """What has not been shown while it came."""
    lines = choice_blocks(result) if len(result.choices) > 1 else iter(("",))
    for line in (*lines, *(logprob_lines(result) if logprobs else ())):
        _write(f"{line}\n")
    print(figures(result), file=sys.stderr)


def _set_input(request: pb.GenerateRequest, text: str, *, chat: bool, system: str | None) -> None:
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


def _bias(text: str) -> pb.LogitBias:
    token_id, _, bias = text.partition("=")
    try:
        return pb.LogitBias(token_id=int(token_id), bias=float(bias))
    except ValueError:
        problem = f"{text!r} is not ID=VALUE, as 42=-1.5 is."
        raise typer.BadParameter(problem, param_hint="--logit-bias") from None


def _structured(json_schema: str | None, regex: str | None, grammar: str | None) -> pb.StructuredOutput | None:
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
    """What the file of that name holds, where there is one; else the value itself, which has ``mark`` in it."""
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


def check_address(address: str) -> None:
    """Raises InvalidConfig unless it is host:port."""
    try:
        parse_address(address)
    except ValueError:
        raise InvalidConfig(
            field="--address", value=address, problem="is not host:port", fix="Write it as 127.0.0.1:50051."
        ) from None


def _write(text: str) -> None:
    global _line_open
    sys.stdout.write(text)
    sys.stdout.flush()
    _line_open = not text.endswith("\n")


def figures(result: GenerateResult) -> str:
    """What a request took, in one line."""
    finished, usage, timings = result.finished, result.finished.usage, result.finished.timings
    per_token_s, num_choices = timings.time_per_output_token_s, len(result.choices)
    cached = f" ({usage.cached_prompt_tokens} cached)" if usage.cached_prompt_tokens else ""
    drawn = f" in {num_choices} choices" if num_choices > 1 else ""
    parts = [
        f"{usage.prompt_tokens} prompt tokens{cached}, "
        f"{usage.completion_tokens} generated{drawn} on {finished.replica}",
        *([] if drawn else [f"ended by {ending(finished)}"]),
    ]
    if timings.HasField("time_to_first_token_s"):
        parts.append(f"time to first token {timings.time_to_first_token_s * 1e3:.1f} ms")
    if per_token_s:
        parts += [f"time per output token {per_token_s * 1e3:.2f} ms", f"{1 / per_token_s:.1f} tokens/s"]
    return "; ".join(parts)


@app.command()
def status(address: ServiceAddress = DEFAULT_ADDRESS) -> None:
    """Who holds what, in which state, under which load."""
    with _errors_in_one_line():
        check_address(address)
        print_status(Console(), fetch_status(address))


@app.command()
def timeline(
    output: Annotated[Path, typer.Argument(metavar="OUTPUT.JSON", help="the file to write")],
    address: ServiceAddress = DEFAULT_ADDRESS,
    last_s: Annotated[float | None, typer.Option("--last", min=0.0, help="only the last so many seconds")] = None,
) -> None:
    """Write the latest requests and steps as a trace that ui.perfetto.dev opens."""
    with _errors_in_one_line():
        check_address(address)
        print(write_timeline(address, output, last_s=last_s))


@app.command()
def schema() -> None:
    """Print the JSON Schema of the cluster file."""
    _write(schema_text())


@app.command()
def demo(config: ConfigPath = Path("deploy/local.yaml"), overrides: Overrides = []) -> None:  # noqa: B006
    """Serve, send one prompt, show what happened, shut everything down."""
    from orchestrator.demo import demo as run

    with _errors_in_one_line():
        run(config, overrides=overrides, console=Console())
