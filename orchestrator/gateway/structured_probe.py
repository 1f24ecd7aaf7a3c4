"""Has clients' grammars tried in a process of its own, before anything is started for their requests."""

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

from orchestrator.gateway.model import ServedModel
from orchestrator.gateway.status import ReplicaUnavailable
from orchestrator.gateway.structured_trial import MAX_COMPILE_S, Setup, Trial, Verdict
from orchestrator.launcher.process import environment
from placement.errors import InvalidRequest
from protos.heterodyne.worker.v1 import worker_pb2

logger = logging.getLogger(__name__)

_MAX_TRIALS = 2
_MAX_VERDICTS = 1024
# A trial ends itself after 4 times its processor time; then something else is wrong.
_PATIENCE_S = 4.0 * MAX_COMPILE_S + 5.0


class GrammarProbe:
    """Asks whether grammars compile for the served model's tokenizer, remembering the answers. For one event loop.

    The process starts with the first grammar, unless it was started before, and again where it is lost.
    """

    def __init__(self, model: ServedModel) -> None:
        self._model = model
        self._slots = asyncio.Semaphore(_MAX_TRIALS)
        self._starting = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[str | None]] = {}
        self._verdicts: OrderedDict[bytes, str | None] = OrderedDict()

    async def check(self, grammar: worker_pb2.Grammar) -> None:
        """Returns where ``grammar``, of ``check_structured``, compiles.

        Some 10 ms for a new grammar, nothing for one that was asked for before; the first one also waits for the
        process to read the tokenizer.

        Raises:
            InvalidRequest: it does not compile, or takes more time or memory than is good for those it shares with.
            ReplicaUnavailable: the process was lost.
        """
        kind = grammar.WhichOneof("format")
        assert kind is not None, grammar
        source: str = getattr(grammar, kind)
        key = hashlib.sha256(f"{kind}\0{source}".encode()).digest()
        if key in self._verdicts:
            self._verdicts.move_to_end(key)
        else:
            self._verdicts[key] = await self._try(kind, source)
            if len(self._verdicts) > _MAX_VERDICTS:
                self._verdicts.popitem(last=False)
        problem = self._verdicts[key]
        if problem is not None:
            raise InvalidRequest(
                field=f"structured_output.{'grammar' if kind == 'lark' else kind}",
                value=source,
                problem=problem,
                fix="Correct it, or send a simpler one.",
            )

    async def start(self) -> None:
        """Starts the process ahead, so that the first grammar does not wait for it to read the tokenizer."""
        await self._running()

    async def close(self) -> None:
        """Ends the process; who still waits is told that it was lost."""
        process, reader = self._process, self._reader
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its trials with it
        if reader is not None:
            await reader

    async def _try(self, kind: str, source: str) -> str | None:
        async with self._slots:
            process = await self._running()
            trial = Trial(id=next(self._ids), kind=kind, source=source)
            verdict: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
            self._waiting[trial["id"]] = verdict
            try:
                async with asyncio.timeout(_PATIENCE_S):
                    await _write(process, trial)
                    return await verdict
            except (TimeoutError, ConnectionError) as error:
                raise _lost() from error
            finally:
                del self._waiting[trial["id"]]

    async def _running(self) -> asyncio.subprocess.Process:
        async with self._starting:
            if self._process is None:
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", "orchestrator.gateway.structured_trial"),
                    env=environment(),
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    start_new_session=True,
                )
                self._process = process
                self._reader = asyncio.create_task(self._read(process))
                setup = Setup(
                    tokenizer=self._model.tokenizer.to_str(),
                    vocab_size=self._model.spec.vocab_size,
                    eos_token_ids=[*self._model.spec.eos_token_ids],
                )
                with contextlib.suppress(ConnectionError):  # it is gone already, which the reader sees
                    await _write(process, setup)
            return self._process

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        """Hands out verdicts until the process ends."""
        assert process.stdout is not None
        async for line in process.stdout:
            verdict: Verdict = json.loads(line)
            waiting = self._waiting.get(verdict["id"])
            if waiting is not None and not waiting.done():
                waiting.set_result(verdict["problem"])
        code = await process.wait()
        logger.info("grammar_process_ended code=%d", code)
        self._process = None
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(_lost())


async def _write(process: asyncio.subprocess.Process, message: Setup | Trial) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps(message).encode() + b"\n")
    await process.stdin.drain()


def _lost() -> ReplicaUnavailable:
    return ReplicaUnavailable("grammars cannot be checked at present; send it again")
