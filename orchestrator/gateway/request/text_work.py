"""Text to token ids and back. Long texts are worked on in threads, so that the event loop goes on meanwhile."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from orchestrator.gateway.errors import DeadlineExceeded
from orchestrator.gateway.fleet.admission import Admission
from orchestrator.gateway.model import ServedModel
from orchestrator.gateway.request.request import check_text

Result = TypeVar("Result")

# What is shorter is done at once, on the event loop: it takes about as long as to hand it to a thread.
INLINE_CHARACTERS, INLINE_IDS = 4096, 1024
# Two instances and a timeline take five threads, as many as asyncio's pool has on a machine of one core.
_NUM_THREADS, _MAX_WAITING = 2, 64


class TextWork:
    """Converts texts of one origin, a few at a time. Lives on one event loop.

    Each origin has an instance, and so threads and a queue, of its own: a flood from one does not hold up another.
    """

    def __init__(self, model: ServedModel) -> None:
        self._model = model
        self._slots = Admission(_NUM_THREADS, _MAX_WAITING)

    async def tokenize(self, text: str, *, field: str, special: bool, timeout_s: float) -> list[int]:
        """Returns the token ids of ``text``.

        Args:
            field: where the text came from, for the error.
            special: whether the tokenizer adds its special tokens.
            timeout_s: how long a long text may wait and take.

        Raises:
            InvalidRequest: the text cannot fit the context.
            NotAdmitted: too many texts wait, or no thread came free in time.
            DeadlineExceeded: the work took too long.
        """
        check_text(text, self._model, field=field)
        tokenizer = self._model.tokenizer
        if len(text) <= INLINE_CHARACTERS:
            return list(tokenizer.encode(text, add_special_tokens=special).ids)

        def encode() -> list[int]:
            # A batch of one: unlike `encode` it lets go of the interpreter's lock.
            (encoding,) = tokenizer.encode_batch([text], add_special_tokens=special)
            return list(encoding.ids)

        return await self.run(encode, timeout_s=timeout_s)

    async def detokenize(self, token_ids: Sequence[int], *, skip_special: bool, timeout_s: float) -> str:
        """Returns the text of ``token_ids``, which are all within the vocabulary.

        Args:
            skip_special: whether special tokens are left out.
            timeout_s: how long many ids may wait and take.

        Raises:
            NotAdmitted: too many texts wait, or no thread came free in time.
            DeadlineExceeded: the work took too long.
        """
        tokenizer = self._model.tokenizer

        def decode() -> str:
            (text,) = tokenizer.decode_batch([list(token_ids)], skip_special_tokens=skip_special)
            return str(text)

        return decode() if len(token_ids) <= INLINE_IDS else await self.run(decode, timeout_s=timeout_s)

    async def run(self, work: Callable[[], Result], *, timeout_s: float) -> Result:
        """Runs ``work`` in a thread, which keeps its slot until it is done, even where its caller has left.

        Raises:
            NotAdmitted: too many wait, or no thread came free in time.
            DeadlineExceeded: the work took too long.
        """
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + timeout_s
        await self._slots.acquire(timeout_s=timeout_s)
        working = loop.run_in_executor(None, work)
        working.add_done_callback(self._end)
        try:
            async with asyncio.timeout_at(deadline_s):
                return await asyncio.shield(working)
        except TimeoutError:
            raise DeadlineExceeded(f"the text was not converted within {timeout_s:.3g} s") from None

    def _end(self, working: asyncio.Future[Any]) -> None:
        self._slots.release()
        if not working.cancelled():
            working.exception()  # whoever waited for it may have left, and asyncio complains of errors that nobody saw
