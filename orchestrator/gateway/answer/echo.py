"""Echoes a prompt: its tokens and text, with log-probabilities as the replica computes them. Pure."""

from collections.abc import Iterator, Sequence

from orchestrator.gateway.answer.text import TextStream
from orchestrator.gateway.client import Echoed, TokenScore
from orchestrator.gateway.fleet.journal import JournalError
from protos.heterodyne.worker.v1 import worker_pb2

# In one event. With 20 alternatives to each, its message takes some 100 kB, far below what a client takes.
_MAX_TOKENS = 512


class BrokenEcho(JournalError):
    """Raised where a replica's log-probabilities of the prompt do not fit the prompt, or each other."""


class Echo:
    """Knows what a client has seen of its prompt.

    Args:
        text: a fresh stream with neither prompt nor stop strings.
        judged: whether log-probabilities were asked for. Without them no replica is needed.
    """

    def __init__(self, prompt_ids: Sequence[int], text: TextStream, *, judged: bool) -> None:
        self._prompt_ids = prompt_ids
        self._text = text
        self._judged = judged
        self._num_sent = 0

    @property
    def done(self) -> bool:
        """Says whether the whole prompt was sent."""
        return self._num_sent == len(self._prompt_ids)

    def opening(self) -> Iterator[Echoed]:
        """Yields what can be sent at once: everything, unless log-probabilities must come first."""
        if not self._judged or len(self._prompt_ids) == 1:  # the first token never has one
            yield from self._plain()

    def _plain(self) -> Iterator[Echoed]:
        while not self.done:
            yield self._run(min(len(self._prompt_ids), self._num_sent + _MAX_TOKENS))

    def take(self, run: worker_pb2.PromptLogprobs) -> Iterator[Echoed]:
        """Yields the events for a run of log-probabilities. What was sent is not sent again.

        Raises:
            BrokenEcho: the run leaves a gap, or does not fit the prompt.
        """
        first, count = run.first_index, len(run.logprobs)
        if not 1 <= first <= max(1, self._num_sent) or first + count > len(self._prompt_ids):
            raise BrokenEcho(
                f"log-probabilities of prompt tokens {first} to {first + count - 1} came, "
                f"of {len(self._prompt_ids)}, when {max(1, self._num_sent)} was due"
            )
        if len(run.top_ids) != len(run.top_logprobs) or (count and len(run.top_ids) % count):
            raise BrokenEcho("the alternatives to prompt tokens are not equally many for each")
        while self._num_sent < first + count:
            yield self._run(min(first + count, self._num_sent + _MAX_TOKENS), run)

    def _run(self, stop: int, run: worker_pb2.PromptLogprobs | None = None) -> Echoed:
        """Returns the tokens from where the last run ended to ``stop``."""
        start, self._num_sent = self._num_sent, stop
        token_ids = self._prompt_ids[start:stop]
        text = self._text.push(*token_ids).text
        if self.done:
            text += self._text.finish().text
        scores = {}
        if run is not None:
            first = max(start, run.first_index)
            scores = {index - start: _score(run, index - run.first_index) for index in range(first, stop)}
        return Echoed(first_index=start, token_ids=token_ids, scores=scores, text=text)


def _score(run: worker_pb2.PromptLogprobs, position: int) -> TokenScore:
    """Returns what the run says at ``position``."""
    num_top = len(run.top_ids) // len(run.logprobs)
    top = slice(position * num_top, (position + 1) * num_top)
    return TokenScore(
        logprob=run.logprobs[position], top=tuple(zip(run.top_ids[top], run.top_logprobs[top], strict=True))
    )
