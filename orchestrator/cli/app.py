"""Parses the command line and prints; other modules do the work of its commands."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from orchestrator.cli import generate_options as options
from orchestrator.cli.client import GenerateResult, stream_generate, transfer_words
from orchestrator.cli.plan import show_plan
from orchestrator.cli.render import choice_blocks, ending, logprob_lines
from orchestrator.cli.replay import options as replay_options
from orchestrator.cli.status_command import show_status, watch_status
from orchestrator.cli.timeline_command import write_timeline
from orchestrator.config.document import settings_variables
from orchestrator.config.environment import unknown_variables
from orchestrator.config.json_schema import schema_text
from orchestrator.config.types import parse_address
from orchestrator.errors import refuse
from orchestrator.event_log import EventLog, LogFormat, LogHandler, LogLevel, Said
from orchestrator.output import queued_output
from placement.errors import HeterodyneError, InvalidConfig
from protos.codec.log_record import log_to
from protos.heterodyne.v1 import inference_pb2 as pb

app = typer.Typer(
    name="heterodyne",
    help="Heterodyne serves one large language model on the machines a team really has.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
DEFAULT_ADDRESS = "127.0.0.1:50051"
# Whether the last thing written to standard output left its line open.
_line_open = False

ConfigPath = Annotated[Path, typer.Argument(metavar="CLUSTER.YAML", help="the cluster file")]
DemoPath = Annotated[
    Path | None, typer.Argument(metavar="CLUSTER.YAML", help="the cluster file; default: that of the demo model")
]
Overrides = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="change one value of the file")]
ServiceAddress = Annotated[str, typer.Option("--address", envvar="HETERODYNE_ADDRESS", help="host:port of the service")]
LogFormatOption = Annotated[
    LogFormat, typer.Option("--log-format", help="auto: sentences on a terminal, key=value lines elsewhere")
]
LogLevelOption = Annotated[LogLevel, typer.Option("--log-level", help="the least important lines to print")]


@contextmanager
def _errors_in_one_line(log: EventLog | None = None) -> Iterator[None]:
    """Prints an error that is meant for the user as one line on standard error, without a traceback; exits with 1.

    It is the answer of the command, so it looks the same in all formats but JSON, where every line is an object.
    """
    try:
        yield
    except HeterodyneError as error:
        if _line_open:
            _write("\n")
        line = f"error: {error}"
        if log is not None and log.format is LogFormat.JSON:
            line = log.line(Said(event="error", sentence=str(error), level=LogLevel.ERROR))
        print(line, file=sys.stderr, flush=True)
        raise typer.Exit(1) from None


def _show_version(asked: bool) -> None:
    if not asked:
        return
    try:
        version = metadata.version("heterodyne")
    except metadata.PackageNotFoundError:  # the code was copied here, as --working-dir does
        version = "of this directory, which is not installed"
    _write(f"heterodyne {version}\n")
    raise typer.Exit()


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    """Heterodyne serves one large language model on the machines a team really has."""


@app.command()
def serve(
    config: ConfigPath,
    overrides: Overrides = [],  # noqa: B006 - typer copies it
    log_format: LogFormatOption = LogFormat.AUTO,
    log_level: LogLevelOption = LogLevel.INFO,
    ready_fd: Annotated[int | None, typer.Option("--ready-fd", hidden=True)] = None,
) -> None:
    """Serve a model until Ctrl-C or SIGTERM, then drain."""
    # Here, because it imports Ray, which takes a second that `generate` and `status` need not wait.
    from orchestrator.deployment.serve import serve as run

    log = EventLog(Console(), format=log_format, level=log_level)
    # A terminal that is paused, or a pager, must not stop the service.
    with queued_output(log.dropped_line), _errors_in_one_line(log):
        log_to(LogHandler(log), level=log_level.value)
        code = run(config, overrides=overrides, log=log, on_ready=partial(_tell_ready, ready_fd))
    raise typer.Exit(code)


def _tell_ready(descriptor: int | None) -> None:
    """Writes a byte to the descriptor that whoever started ``serve`` waits at."""
    if descriptor is not None:
        with suppress(OSError):  # nobody waits any more
            os.write(descriptor, b"1")


@app.command()
def generate(
    prompt: options.Prompt,
    address: ServiceAddress = DEFAULT_ADDRESS,
    chat: options.Chat = False,
    system: options.System = None,
    max_tokens: options.MaxTokens = None,
    min_tokens: options.MinTokens = 0,
    n: options.NumChoices = 1,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    presence_penalty: options.Penalty = None,
    frequency_penalty: options.Penalty = None,
    logit_bias: options.LogitBias = [],  # noqa: B006 - typer copies it
    seed: options.Seed = None,
    stop: options.Stop = [],  # noqa: B006
    json_schema: options.JsonSchema = None,
    regex: options.Regex = None,
    grammar: options.Grammar = None,
    echo: options.Echo = False,
    logprobs: options.Logprobs = None,
    cache_salt: options.CacheSalt = "",
    timeout_s: options.TimeoutS = 600.0,
) -> None:
    """Continue a prompt; the answer streams to standard output, the figures to standard error."""
    sampling = pb.SamplingParams(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed,
        repetition_penalty=repetition_penalty, presence_penalty=presence_penalty, frequency_penalty=frequency_penalty,
        logit_bias=options.biases(logit_bias),
    )  # fmt: skip
    request = pb.GenerateRequest(
        max_tokens=options.checked_max_tokens(max_tokens, echo=echo), min_tokens=min_tokens, num_choices=n, stop=stop,
        echo=echo, logprobs=logprobs, cache_salt=cache_salt, sampling=sampling,
        structured_output=options.structured(json_schema, regex, grammar),
    )  # fmt: skip
    options.set_input(request, prompt, chat=chat, system=system)
    _ask(address, request, timeout_s=timeout_s)


def _ask(address: str, request: pb.GenerateRequest, *, timeout_s: float) -> None:
    """Sends a request, shows its answer as it comes, and then the rest."""
    with _errors_in_one_line():
        check_address(address)
        result = stream_generate(address, request, timeout_s=timeout_s, on_text=_write)
    _show(result, logprobs=request.HasField("logprobs"))


def _show(result: GenerateResult, *, logprobs: bool) -> None:
    """Shows what was not shown while the answer came."""
    lines = choice_blocks(result) if len(result.choices) > 1 else iter(("",))
    for line in (*lines, *(logprob_lines(result) if logprobs else ())):
        _write(f"{line}\n")
    print(figures(result), file=sys.stderr)


def check_address(address: str) -> None:
    """Raises InvalidConfig unless it is host:port, and where a variable was to say it that has another name."""
    refuse("environment", unknown_variables(os.environ, settings_variables()))
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
    """Says in one line what a request took."""
    finished, usage, timings = result.finished, result.finished.usage, result.finished.timings
    per_token_s, num_choices = timings.time_per_output_token_s, len(result.choices)
    cached = f" ({usage.cached_prompt_tokens} cached)" if usage.cached_prompt_tokens else ""
    drawn = f" in {num_choices} choices" if num_choices > 1 else ""
    parts = [
        f"{usage.prompt_tokens} prompt tokens{cached}, "
        f"{usage.completion_tokens} generated{drawn} on {finished.replica}",
        *([] if drawn else [f"ended by {ending(finished)}"]),
    ]
    if sent := transfer_words(finished):
        parts.append(sent)
    if timings.HasField("time_to_first_token_s"):
        parts.append(f"time to first token {timings.time_to_first_token_s * 1e3:.1f} ms")
    if per_token_s:
        parts += [f"time per output token {per_token_s * 1e3:.2f} ms", f"{1 / per_token_s:.1f} tokens/s"]
    return "; ".join(parts)


@app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = [],  # noqa: B006
    svg: Annotated[Path | None, typer.Option("--svg", metavar="FILE", help="also draw it, as an SVG")] = None,
) -> None:
    """Who would hold what, without starting anything."""
    with _errors_in_one_line():
        for line in show_plan(config, overrides=overrides, picture=svg, in_words=sys.stdout.isatty()):
            print(line)


@app.command()
def status(
    address: ServiceAddress = DEFAULT_ADDRESS,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON document with stable names")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="show it again and again, until Ctrl-C")] = False,
    every_s: Annotated[float, typer.Option("--every", metavar="SECONDS", min=0.1, help="how often to --watch")] = 1.0,
    measured: Annotated[
        bool, typer.Option("--measured", help="also what links and overlap were found to take")
    ] = False,
) -> None:
    """Who holds what, in which state, under which load."""
    with _errors_in_one_line():
        check_address(address)
        if watch:
            watch_status(Console(), address, every_s=every_s, as_json=as_json)
        else:
            show_status(Console(), address, as_json=as_json, measured=measured)


@app.command()
def timeline(
    output: Annotated[Path, typer.Argument(metavar="OUTPUT.JSON", help="the file to write")],
    address: ServiceAddress = DEFAULT_ADDRESS,
    last_s: Annotated[float | None, typer.Option("--last", min=0.0, help="only the last so many seconds")] = None,
    svg: Annotated[
        Path | None, typer.Option("--svg", metavar="FILE", help="also draw who did what for one request, as an SVG")
    ] = None,
    request_id: Annotated[
        str | None, typer.Option("--request", metavar="ID", help="the request to draw; default: the last that ended")
    ] = None,
) -> None:
    """Write the latest requests and steps as a trace that ui.perfetto.dev opens."""
    with _errors_in_one_line():
        check_address(address)
        print(write_timeline(address, output, last_s=last_s, picture=svg, request_id=request_id))


@app.command()
def replay(
    trace: replay_options.Trace,
    address: ServiceAddress = DEFAULT_ADDRESS,
    rate: replay_options.Rate = 1.0,
    scale: replay_options.Scale = 1.0,
    duration_s: replay_options.DurationS = None,
    limit: replay_options.Limit = None,
    slo_ttft_s: replay_options.SloTtftS = None,
    slo_tbt_s: replay_options.SloTbtS = None,
    slowdowns: replay_options.Slowdowns = False,
    as_json: replay_options.AsJson = False,
    png: replay_options.Png = None,
    timeout_s: replay_options.TimeoutS = 600.0,
    max_in_flight: replay_options.MaxInFlight = 4096,
    seed: replay_options.Seed = 0,
    vocab_size: replay_options.VocabSize = None,
) -> None:
    """Send a recorded trace of requests at the recorded times, and report latencies."""
    # Here, as it imports numpy, which other commands need not wait for.
    from orchestrator.cli.replay.command import replay as run

    with _errors_in_one_line():
        asked = replay_options.ReplayOptions(
            trace=trace, address=address, rate=rate, scale=scale, duration_s=duration_s, limit=limit,
            slo_ttft_s=slo_ttft_s, slo_tbt_s=slo_tbt_s, slowdowns=slowdowns, as_json=as_json, png=png,
            timeout_s=timeout_s, max_in_flight=max_in_flight, seed=seed, vocab_size=vocab_size,
        )  # fmt: skip
        check_address(address)
        if not run(asked, output=Console(), progress=Console(stderr=True)):
            raise typer.Exit(1)


@app.command()
def schema() -> None:
    """Print the JSON Schema of the cluster file."""
    _write(schema_text())


@app.command()
def demo(
    config: DemoPath = None,
    overrides: Overrides = [],  # noqa: B006
    log_format: LogFormatOption = LogFormat.AUTO,
) -> None:
    """Serve, send one prompt, show what happened, shut everything down."""
    from orchestrator.cli.demo import demo as run
    from orchestrator.cli.demo import demo_file

    with _errors_in_one_line():
        run(config or demo_file(), overrides=overrides, console=Console(), log_format=log_format)
