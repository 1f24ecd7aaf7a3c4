"""Tries clients' grammars in a process of its own, before anything is started for their requests."""

import asyncio
import contextlib
import hashlib
import itertools
import json
import logging
import os
import signal
import sys
from collections import OrderedDict
from dataclasses import dataclass

from orchestrator.gateway.errors import ReplicaFault, ReplicaUnavailable
from orchestrator.gateway.fleet.admission import Admission
from orchestrator.gateway.model import ServedModel
from orchestrator.gateway.request.shown import shown
from orchestrator.gateway.request.structured_trial import MAX_COMPILE_S, Setup, Trial, Verdict
from orchestrator.launcher.process import environment
from placement.errors import InvalidRequest
from placement.serving.grammar import GrammarKind
from protos.codec.log_record import said
from protos.heterodyne.worker.v1 import worker_pb2

logger = logging.getLogger(__name__)

# The fields of StructuredOutput, as clients know them.
_PUBLIC_NAMES: dict[GrammarKind, str] = {"json_schema": "json_schema", "regex": "regex", "lark": "grammar"}
_MAX_TRIALS, _MAX_QUEUED = 2, 64
# The machine, not a grammar, is to blame for as many in a row.
_MAX_USELESS = 5
_MAX_VERDICTS = 1024
# A trial ends itself after 4 times its processor time; then something else is wrong.
_PATIENCE_S = 4.0 * MAX_COMPILE_S + 5.0
# Before its first verdict the process reads the tokenizer.
_START_S = _PATIENCE_S + 60.0


@dataclass(slots=True, kw_only=True, eq=False)
class _SharedTrial:
    """Holds a trial and how many requests wait for its verdict."""

    task: asyncio.Task[str | None]
    num_waiting: int = 0


class GrammarProbe:
    """Finds out which grammars compile for the model's tokenizer, and remembers it. Lives on one event loop.

    The process starts with the first grammar, and again where it is lost. A trial that has begun keeps its place until
    its end, whether anybody still waits for it or not; equal grammars share one.
    """

    def __init__(self, model: ServedModel) -> None:
        self._model = model
        self._places = Admission(_MAX_TRIALS, _MAX_QUEUED)
        self._starting = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._is_closed = False
        self._proven = False  # whether the process has given a verdict
        self._num_useless = 0  # processes in a row that ended before their first verdict
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[str | None]] = {}
        self._trials: dict[bytes, _SharedTrial] = {}
        self._verdicts: OrderedDict[bytes, str | None] = OrderedDict()

    async def check(self, grammar: worker_pb2.Grammar) -> None:
        """Returns if ``grammar``, which ``check_structured`` made, compiles; raises otherwise.

        A new grammar takes some 10 ms, one that was asked for before no time. The first one also waits for the process
        to read the tokenizer.

        Raises:
            InvalidRequest: the grammar does not compile, or takes more time or memory than one request may.
            NotAdmitted: too many grammars wait to be tried.
            ReplicaUnavailable: the process was lost.
            ReplicaFault: the process ends whenever it is started.
        """
        kind = grammar.WhichOneof("format")
        assert kind is not None, grammar
        source: str = getattr(grammar, kind)
        key = hashlib.sha256(f"{kind}\0{source}".encode()).digest()
        if key in self._verdicts:
            self._verdicts.move_to_end(key)
            problem = self._verdicts[key]
        else:
            problem = await self._share(key, kind, source)
        if problem is not None:
            raise InvalidRequest(
                field=f"structured_output.{_PUBLIC_NAMES[kind]}",
                value=shown(source),
                problem=problem,
                fix="Correct it, or send a simpler one.",
            )

    async def close(self) -> None:
        """Ends the process. Requests that still wait for it are told that it was lost."""
        self._is_closed = True
        tasks = [trial.task for trial in self._trials.values()]
        for task in tasks:
            task.cancel()
        if self._process is not None:
            _kill(self._process)
        await asyncio.gather(*tasks, *([] if self._reader is None else [self._reader]), return_exceptions=True)

    async def _share(self, key: bytes, kind: GrammarKind, source: str) -> str | None:
        """Returns the verdict of the grammar's one trial, which goes on even where nobody waits for it any more."""
        trial = self._trials.get(key)
        if trial is None:
            trial = _SharedTrial(task=asyncio.create_task(self._try(key, kind, source)))
            trial.task.add_done_callback(lambda task: self._end(key, task))
            self._trials[key] = trial
        trial.num_waiting += 1
        try:
            await asyncio.wait({trial.task})
        finally:
            trial.num_waiting -= 1
        if trial.task.cancelled():
            raise _lost()
        return trial.task.result()

    def _end(self, key: bytes, task: asyncio.Task[str | None]) -> None:
        del self._trials[key]
        # The error is for those who wait, of whom there may be none left.
        if not task.cancelled() and task.exception() is None:
            self._verdicts[key] = task.result()
            if len(self._verdicts) > _MAX_VERDICTS:
                self._verdicts.popitem(last=False)

    async def _try(self, key: bytes, kind: GrammarKind, source: str) -> str | None:
        async with self._places.slot():
            if not self._trials[key].num_waiting:
                raise _lost()  # everybody left before it began
            process = await self._running()
            trial = Trial(id=next(self._ids), kind=kind, source=source)
            verdict: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
            self._waiting[trial["id"]] = verdict
            try:
                async with asyncio.timeout(_PATIENCE_S if self._proven else _START_S):
                    await _write(process, trial)
                    return await verdict
            except (TimeoutError, ConnectionError) as error:
                _kill(process)  # what it forked must not go on without a place
                raise _lost() from error
            finally:
                del self._waiting[trial["id"]]

    async def _running(self) -> asyncio.subprocess.Process:
        async with self._starting:
            if self._process is None:
                if self._num_useless >= _MAX_USELESS:
                    raise ReplicaFault("structured output is off: the process that checks grammars ends at its start")
                setup = _setup(self._model)
                self._process = process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", "orchestrator.gateway.request.structured_trial"),
                    env=environment(),
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    start_new_session=True,
                )
                self._reader = asyncio.create_task(self._read(process))
                with contextlib.suppress(ConnectionError):  # it is gone already, which the reader sees
                    await _write_line(process, setup)
                return process
            return self._process

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        """Hands out verdicts until the process ends."""
        assert process.stdout is not None
        self._proven = False
        try:
            async for line in process.stdout:
                verdict: Verdict = json.loads(line)
                self._proven = True
                waiting = self._waiting.get(verdict["id"])
                if waiting is not None and not waiting.done():
                    waiting.set_result(verdict["problem"])
        except ValueError:
            words = "The process that tries grammars wrote what cannot be read."
            logger.exception(words, extra=said("grammar_process_misread"))
        finally:
            self._process = None
            _kill(process)
            self._num_useless = 0 if self._proven else self._num_useless + 1
            for waiting in self._waiting.values():
                if not waiting.done():
                    waiting.set_exception(_lost())
            code = await process.wait()
            if not self._is_closed:  # else it was killed to end with the gateway, and there is no next one
                words = "The process that tries grammars ended with exit code %d; the next grammar starts another."
                logger.info(words, code, extra=said("grammar_process_ended", code=code))


def _setup(model: ServedModel) -> bytes:
    """Returns the first line for the process, which reads the tokenizer by itself where there are files.

    A tokenizer is megabytes of JSON: written out here, it would hold every stream up for some tenths of a second.
    """
    directory = model.directory
    setup = Setup(
        directory=None if directory is None else str(directory),
        tokenizer=model.tokenizer.to_str() if directory is None else "",
        vocab_size=model.spec.vocab_size,
        eos_token_ids=[*model.spec.eos_token_ids],
    )
    return json.dumps(setup).encode()


def _kill(process: asyncio.subprocess.Process) -> None:
    """Kills the process and its trials."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


async def _write(process: asyncio.subprocess.Process, trial: Trial) -> None:
    await _write_line(process, json.dumps(trial).encode())


async def _write_line(process: asyncio.subprocess.Process, line: bytes) -> None:
    assert process.stdin is not None
    process.stdin.write(line + b"\n")
    await process.stdin.drain()


def _lost() -> ReplicaUnavailable:
    return ReplicaUnavailable("grammars cannot be checked at present; send it again")
