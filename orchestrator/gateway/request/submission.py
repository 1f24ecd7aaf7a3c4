"""Makes a checked request's journal entries and the message that submits it to a replica. Pure."""

from collections.abc import Iterator, Sequence

from orchestrator.gateway.fleet.journal import JournalEntry
from orchestrator.gateway.request.request import Request
from protos.heterodyne.worker.v1 import worker_pb2

_NUM_SEEDS = 2**64


def entries(request: Request, *, replica: str, epoch: int, sequence_ids: Iterator[int]) -> list[JournalEntry]:
    """Returns a sequence for each choice. Choice i draws what a request of its own with the seed plus i would.

    All of them hold the request's one tuple of prompt ids.

    A request that only looks at its prompt still asks for one token: a replica computes a prompt to draw one.
    """
    return [
        JournalEntry(
            request_id=request.request_id,
            sequence_id=next(sequence_ids),
            replica=replica,
            epoch=epoch,
            prompt_ids=request.prompt_ids,
            sampling=request.sampling,
            seed=(request.seed + index) % _NUM_SEEDS,
            max_tokens=max(1, request.max_tokens),
            stop_token_ids=request.stop_token_ids,
            priority=request.priority,
            min_tokens=request.min_tokens,
            cache_salt=request.cache_salt,
            grammar=request.grammar,
        )
        for index in range(request.num_choices)
    ]


def submit_message(request: Request, sequences: Sequence[JournalEntry]) -> worker_pb2.Submit:
    """Returns what a replica is told of a request: the prompt once, and a fork for each sequence of ``entries``.

    The first fork alone reports the log-probabilities of the prompt, where the client sees them.
    """
    first = sequences[0]
    message = worker_pb2.Submit(
        forks=[worker_pb2.Fork(sequence_id=entry.sequence_id, seed=entry.seed) for entry in sequences],
        prompt_ids=first.prompt_ids,
        sampling=first.sampling,
        max_tokens=first.max_tokens,
        stop_token_ids=first.stop_token_ids,
        priority=first.priority,
        logprobs=request.logprobs,
        min_tokens=first.min_tokens,
        cache_salt=first.cache_salt,
        grammar=first.grammar,
    )
    if request.echo and request.logprobs is not None:
        message.forks[0].prompt_logprobs = request.logprobs
    return message
