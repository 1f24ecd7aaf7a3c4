"""The command line: serve, generate, status, schema, demo. Parses and prints; the work is done elsewhere."""

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
from orchestrator.render import ending, print_status
from orchestrator.schema import schema_text
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
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, max=_INT32, help="most tokens; default: to the text's end"),
    ] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, max=100.0, help="0 is greedy")] = None,
    top_k: Annotated[int | None, typer.Option(min=0, max=_INT32, help="0 is all tokens")] = None,
    top_p: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="1 is all tokens")] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=_UINT64, help="draws the same answer again")] = None,
    stop: Annotated[list[str], typer.Option(help="end before this text; may be repeated")] = [],  # noqa: B006
    timeout_s: Annotated[float, typer.Option("--timeout", min=0.001, max=86400.0, help="seconds")] = 600.0,
) -> None:
    """Continue a prompt; the answer streams to standard output, the figures to standard error."""
    request = pb.GenerateRequest(
        prompt=sys.stdin.read() if prompt == "-" else prompt,
        max_tokens=max_tokens,
        stop=stop,
        sampling=pb.SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed),
    )
    with _errors_in_one_line():
        check_address(address)
        result = stream_generate(address, request, timeout_s=timeout_s, on_text=_write)
    _write("\n")
    print(figures(result), file=sys.stderr)


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
    per_token_s = timings.time_per_output_token_s
    parts = [
        f"{usage.prompt_tokens} prompt tokens, {usage.completion_tokens} generated on {finished.replica}",
        f"ended by {ending(finished)}",
        f"time to first token {timings.time_to_first_token_s * 1e3:.1f} ms",
    ]
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
def schema() -> None:
    """Print the JSON Schema of the cluster file."""
    _write(schema_text())


@app.command()
def demo(config: ConfigPath = Path("deploy/local.yaml"), overrides: Overrides = []) -> None:  # noqa: B006
    """Serve, send one prompt, show what happened, shut everything down."""
    from orchestrator.demo import demo as run

    with _errors_in_one_line():
        run(config, overrides=overrides, console=Console())
