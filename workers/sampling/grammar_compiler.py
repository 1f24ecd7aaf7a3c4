"""Compiles grammars beside an event loop: each once at a time, however many sequences wait for it."""

import asyncio
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from workers.sampling.grammar import Grammar, GrammarFactory, GrammarSpec


@dataclass(slots=True, kw_only=True, eq=False)
class _Compilation:
    """A grammar being compiled, or about to be.

    Attributes:
        job: on the thread that compiles.
        result: the same on the event loop.
        num_waiting: sequences that still want it.
    """

    job: Future[Grammar]
    result: asyncio.Future[Grammar]
    num_waiting: int = 0


class GrammarCompiler:
    """Threads that compile, and who waits for what. Lives on one event loop.

    Args:
        factory: knows the model's tokenizer, and keeps what was compiled lately.
    """

    def __init__(self, factory: GrammarFactory) -> None:
        self._factory = factory
        self._threads = ThreadPoolExecutor(thread_name_prefix="grammar")
        self._under_way: dict[GrammarSpec, _Compilation] = {}

    async def compile(self, spec: GrammarSpec) -> Grammar:
        """As :meth:`GrammarFactory.compile`. Who is cancelled cancels nobody else.

        What nobody waits for any more is not begun; once begun it is compiled to its end, since nothing can stop it.
        """
        compilation = self._under_way.get(spec) or self._begin(spec)
        compilation.num_waiting += 1
        try:
            return await asyncio.shield(compilation.result)
        finally:
            compilation.num_waiting -= 1
            if not compilation.num_waiting and compilation.job.cancel():
                self._forget(spec, compilation)

    def _begin(self, spec: GrammarSpec) -> _Compilation:
        job = self._threads.submit(self._factory.compile, spec)
        compilation = _Compilation(job=job, result=asyncio.wrap_future(job))
        self._under_way[spec] = compilation
        compilation.result.add_done_callback(lambda _: self._forget(spec, compilation))
        return compilation

    def _forget(self, spec: GrammarSpec, compilation: _Compilation) -> None:
        if self._under_way.get(spec) is compilation:
            del self._under_way[spec]
        if compilation.result.done() and not compilation.result.cancelled():
            compilation.result.exception()  # asyncio complains of errors that nobody looked at; none may be left to

    def close(self) -> None:
        """Nothing more is begun."""
        self._threads.shutdown(wait=False, cancel_futures=True)
