"""The echo of a prompt: its tokens and text, with log-probabilities as the replica computes them. Pure."""

from collections.abc import Iterator, Sequence

from orchestrator.gateway.answer.text import TextStream
from orchestrator.gateway.fleet.journal import JournalError
from protos.heterodyne.v1 import inference_pb2 as pb
from protos.heterodyne.worker.v1 import worker_pb2

# In one message: with 20 alternatives to each some 100 kB, far below what a client takes, and the work of a moment.
_MAX_TOKENS = 512


class BrokenEcho(JournalError):
    """A replica's log-probabilities of the prompt do not fit the prompt, or each other."""


class Echo:
    """What a client has seen of its prompt.

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
        """Whether the whole prompt was sent."""
        return self._num_sent == len(self._prompt_ids)

    def opening(self) -> Iterator[pb.GenerateResponse]:
        """What can be said at once: everything, unless log-probabilities must come; the first token never has one."""
        if not self._judged or len(self._prompt_ids) == 1:
            yield from self._plain()

    def _plain(self) -> Iterator[pb.GenerateResponse]:
        while not self.done:
            yield self._message(min(len(self._prompt_ids), self._num_sent + _MAX_TOKENS))

    def take(self, run: worker_pb2.PromptLogprobs) -> Iterator[pb.GenerateResponse]:
        """The messages for a run of log-probabilities. What was sent is not sent again.

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
            yield self._message(min(first + count, self._num_sent + _MAX_TOKENS), run)

    def _message(self, stop: int, run: worker_pb2.PromptLogprobs | None = None) -> pb.GenerateResponse:
        """The tokens from where the last message ended to ``stop``."""
        response = pb.GenerateResponse()
        echo = response.echo
        echo.first_index = self._num_sent
        token_ids = self._prompt_ids[self._num_sent : stop]
        for index, token_id in enumerate(token_ids, self._num_sent):
            token = echo.tokens.add(id=token_id)
            if run is not None and index >= run.first_index:
                _judge(token, run, index - run.first_index)
        echo.text = self._text.push(*token_ids).text
        self._num_sent = stop
        if self.done:
            echo.text += self._text.finish().text
        return response


def _judge(token: pb.Token, run: worker_pb2.PromptLogprobs, position: int) -> None:
    """Writes what the run says at ``position`` into ``token``."""
    token.logprob = run.logprobs[position]
    num_top = len(run.top_ids) // len(run.logprobs)
    start = position * num_top
    for offset in range(start, start + num_top):
        token.top.add(token_id=run.top_ids[offset], logprob=run.top_logprobs[offset])
