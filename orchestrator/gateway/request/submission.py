"""From a checked request to what is remembered of its sequences, and to what a replica is told of them. Pure."""

from collections.abc import Iterator
from dataclasses import replace

from orchestrator.gateway.fleet.journal import JournalEntry, Sampling
from orchestrator.gateway.request.request import Request
from protos.heterodyne.worker.v1 import worker_pb2

_SEEDS = 2**64


def entries(request: Request, *, replica: str, epoch: int, sequence_ids: Iterator[int]) -> list[JournalEntry]:
    """A sequence for each choice: choice i as a request of its own would draw it with the seed plus i.

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
            sampling=replace(request.sampling, seed=(request.sampling.seed + index) % _SEEDS),
            max_tokens=max(1, request.max_tokens),
            stop_token_ids=request.stop_token_ids,
            priority=request.priority,
            min_tokens=request.min_tokens,
            cache_salt=request.cache_salt,
            grammar=request.grammar,
        )
        for index in range(request.num_choices)
    ]


def submit_message(request: Request, entry: JournalEntry, *, judge_prompt: bool) -> worker_pb2.Submit:
    """What a replica is told of a sequence.

    Args:
        judge_prompt: whether this sequence reports the log-probabilities of the prompt; one of a request's does.
    """
    return worker_pb2.Submit(
        sequence_id=entry.sequence_id,
        prompt_ids=entry.prompt_ids,
        sampling=_sampling(entry.sampling),
        max_tokens=entry.max_tokens,
        stop_token_ids=entry.stop_token_ids,
        priority=entry.priority,
        logprobs=request.logprobs,
        min_tokens=entry.min_tokens,
        prompt_logprobs=request.logprobs if judge_prompt else None,
        cache_salt=entry.cache_salt,
        grammar=entry.grammar,
    )


def _sampling(sampling: Sampling) -> worker_pb2.Sampling:
    return worker_pb2.Sampling(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        seed=sampling.seed,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        bias_ids=[token_id for token_id, _ in sampling.logit_bias],
        biases=[bias for _, bias in sampling.logit_bias],
    )
