"""Owns the command ``replay``: reads a trace, sends it, and reports what was measured."""

import asyncio
import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import grpc
from rich.console import Console

from orchestrator.cli.client import CHANNEL_OPTIONS, fetch_model
from orchestrator.cli.replay.curves import curves
from orchestrator.cli.replay.figures import sum_up
from orchestrator.cli.replay.idle import idle_requests, measure_idle
from orchestrator.cli.replay.options import ReplayOptions
from orchestrator.cli.replay.outcome import Outcome
from orchestrator.cli.replay.picture import check_can_draw, draw
from orchestrator.cli.replay.progress import Show, shown_progress
from orchestrator.cli.replay.prompts import Prompts, make_request
from orchestrator.cli.replay.report import ReplayReport, json_text, lines, table
from orchestrator.cli.replay.schedule import Schedule, make_schedule
from orchestrator.cli.replay.sending import Make, Sender
from orchestrator.cli.replay.slo import IdlePoint, slowdowns
from orchestrator.cli.replay.trace import read_trace
from orchestrator.errors import ServiceError
from placement.errors import InvalidConfig
from protos.heterodyne.v1 import inference_pb2 as pb
from protos.heterodyne.v1 import inference_pb2_grpc

_PROGRESS_EVERY_S = 0.25
_CONNECT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Measured:
    outcomes: Sequence[Outcome]
    idle: Sequence[IdlePoint]
    is_stopped: bool


def replay(options: ReplayOptions, *, output: Console, progress: Console) -> bool:
    """Replays a trace and prints the report. Ctrl-C ends it early, with a report of what was measured.

    Returns:
        False where no request was answered although it was not stopped.

    Raises:
        InvalidTrace: the trace cannot be read.
        InvalidConfig: an option does not fit the trace or the model, or the picture cannot be written.
        ServiceError: the service does not answer before the replay; requests that fail later are counted.
    """
    if options.png is not None:
        check_can_draw(options.png)
    trace = read_trace(options.trace)
    model = fetch_model(options.address)
    prompts = Prompts(seed=options.seed, vocab_size=_vocab_size(options, model))
    schedule = make_schedule(
        trace,
        rate=options.rate,
        scale=options.scale,
        max_context_tokens=model.max_context_tokens,
        duration_s=options.duration_s,
        limit=options.limit,
    )
    # An earlier replay of the same prompts must not have filled the cache for this one.
    make = partial(make_request, prompts=prompts, cache_salt=f"replay {secrets.token_hex(8)}")
    with shown_progress(progress) as show:
        measured = asyncio.run(_measure(options, schedule, make, model.max_context_tokens, show))
    report = _report(options, schedule, measured)
    _print(report, output, as_json=options.as_json)
    if options.png is not None:
        draw(curves(measured.outcomes), options.png, title=f"{options.trace.name}, rate {options.rate:g}")
        progress.print(f"drawn in {options.png}", markup=False, highlight=False, soft_wrap=True)
    return report.is_stopped or report.figures.num_completed > 0


def _vocab_size(options: ReplayOptions, model: pb.Model) -> int:
    wanted = options.vocab_size or model.vocab_size
    if wanted > model.vocab_size:
        problem = f"is more than the model's {model.vocab_size} token ids"
        raise InvalidConfig(field="--vocab-size", value=wanted, problem=problem, fix="Leave it out, or take less.")
    return wanted


async def _measure(
    options: ReplayOptions, schedule: Schedule, make: Make, max_context_tokens: int, show: Show
) -> _Measured:
    """Measures the idle service where that was asked for, and then sends the trace."""
    async with grpc.aio.insecure_channel(options.address, options=CHANNEL_OPTIONS) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        # So that the first request does not count what connecting takes.
        try:
            await asyncio.wait_for(channel.channel_ready(), _CONNECT_S)
        except TimeoutError:
            problem = f"{options.address} was lost; try again"
            raise ServiceError(code=grpc.StatusCode.UNAVAILABLE.name, message=problem) from None
        idle: tuple[IdlePoint, ...] = ()
        if options.slowdowns:
            alone = idle_requests(schedule, max_context_tokens=max_context_tokens)
            idle = await measure_idle(stub, alone, make, timeout_s=options.timeout_s)
        sender = Sender(stub, schedule, make, timeout_s=options.timeout_s, max_in_flight=options.max_in_flight)
        telling = asyncio.create_task(_tell(sender, show))
        try:
            is_whole = await sender.run()
        finally:
            telling.cancel()
            with suppress(asyncio.CancelledError):
                await telling
        return _Measured(outcomes=tuple(sender.outcomes), idle=idle, is_stopped=not is_whole)


async def _tell(sender: Sender, show: Show) -> None:
    while True:
        show(sender.progress())
        await asyncio.sleep(_PROGRESS_EVERY_S)


def _report(options: ReplayOptions, schedule: Schedule, measured: _Measured) -> ReplayReport:
    settings = {
        "trace": str(options.trace),
        "rate": options.rate,
        "scale": options.scale,
        "duration_s": options.duration_s,
        "limit": options.limit,
        "timeout_s": options.timeout_s,
        "max_in_flight": options.max_in_flight,
        "seed": options.seed,
    }
    return ReplayReport(
        figures=sum_up(schedule, measured.outcomes, options.slo),
        settings=settings,
        slo=options.slo,
        slowdowns=slowdowns(measured.outcomes, measured.idle) if measured.idle else (),
        is_stopped=measured.is_stopped,
    )


def _print(report: ReplayReport, output: Console, *, as_json: bool) -> None:
    if not as_json and output.is_terminal:
        output.print(table(report), highlight=False)
        return
    for line in (json_text(report),) if as_json else lines(report):
        output.print(line, markup=False, highlight=False, soft_wrap=True, emoji=False)
