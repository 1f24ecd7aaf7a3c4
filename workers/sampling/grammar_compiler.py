"""Compiles grammars on threads beside an event loop, each once at a time, however many sequences wait for it."""

import asyncio
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from workers.sampling.grammar import Grammar, GrammarFactory, GrammarSpec


@dataclass(slots=True, kw_only=True, eq=False)
class _Compilation:
    """A grammar that is compiled now, or soon.

    Attributes:
        job: its future on the thread that compiles.
        result: the same future on the event loop.
        num_waiting: the number of sequences that still wait for it.
    """

    job: Future[Grammar]
    result: asyncio.Future[Grammar]
    num_waiting: int = 0


class GrammarCompiler:
    """Compiles grammars on threads, and knows who waits for which. It belongs to one event loop.

    Args:
        factory: compiles for the model's tokenizer, and keeps grammars that were used lately.
        num_threads: how many grammars may be compiled at the same time.
    """

    def __init__(self, factory: GrammarFactory, *, num_threads: int) -> None:
        self._factory = factory
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="grammar")
        self._under_way: dict[GrammarSpec, _Compilation] = {}

    async def compile(self, spec: GrammarSpec) -> Grammar:
        """Compiles a grammar, as :meth:`GrammarFactory.compile` does. A caller that is cancelled cancels nobody else.

        A grammar that nobody waits for any more is not begun. Once begun, it is compiled to its end, since nothing can
        stop it.
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
            compilation.result.exception()  # asyncio complains of errors that nobody reads, and nobody may be left to

    def close(self) -> None:
        """Begins nothing more."""
        self._threads.shutdown(wait=False, cancel_futures=True)
