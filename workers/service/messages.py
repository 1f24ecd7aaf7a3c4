"""Translates between the worker protocol's messages and the engine's types. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from placement.errors import HeterodyneError, InvalidRequest, NotEnoughMemory
from placement.serving.admission import Draining
from placement.serving.events import EndReason, LoadSnapshot
from placement.serving.token_budget import StepBudget
from protos.heterodyne.worker.v1 import worker_pb2 as pb
from workers.engine.types import KvTransfer, Output, PrefillSource, StepStats, Stopping, Submission
from workers.sampling.grammar import GrammarSpec, InvalidGrammar
from workers.sampling.sampling import SamplingParams
from workers.step.scoring import PromptScores
from workers.transport.errors import PeerFailed

_END = {
    EndReason.STOP: pb.END_REASON_STOP,
    EndReason.LENGTH: pb.END_REASON_LENGTH,
    EndReason.CANCELLED: pb.END_REASON_CANCELLED,
    EndReason.FAILED: pb.END_REASON_FAILED,
    EndReason.SHIPPED: pb.END_REASON_SHIPPED,
}
# google.rpc.Code numbers, spelled here so that a message can carry them.
INVALID_ARGUMENT = 3
RESOURCE_EXHAUSTED = 8
FAILED_PRECONDITION = 9
UNAVAILABLE = 14


def error_code(error: HeterodyneError) -> int:
    """Returns the google.rpc.Code that a refusal carries on the wire."""
    match error:
        case NotEnoughMemory():
            return RESOURCE_EXHAUSTED
        case InvalidRequest():
            return INVALID_ARGUMENT
        case Draining() | Stopping() | PeerFailed():
            return UNAVAILABLE
        case _:
            return FAILED_PRECONDITION


def rejected(sequence_id: int, error: HeterodyneError) -> pb.Rejected:
    """Returns the message that tells the gateway of a refusal."""
    return pb.Rejected(
        sequence_id=sequence_id,
        code=error_code(error),
        message=str(error),
        grammar_problem=error.problem if isinstance(error, InvalidGrammar) else None,
    )


def grammar_spec(message: pb.Submit) -> GrammarSpec | None:
    """Returns the grammar that the answer must match, or None where the request sets none.

    Raises:
        InvalidGrammar: the grammar is of a kind that this worker does not know.
    """
    if not message.HasField("grammar"):
        return None
    match message.grammar.WhichOneof("format"):
        case "json_schema":
            return GrammarSpec(kind="json_schema", source=message.grammar.json_schema)
        case "regex":
            return GrammarSpec(kind="regex", source=message.grammar.regex)
        case "lark":
            return GrammarSpec(kind="lark", source=message.grammar.lark)
    raise InvalidGrammar(field="grammar", value="", problem="has no format that is known", fix="Set one.")


def submissions(message: pb.Submit, *, vocab_size: int) -> list[tuple[int, Submission]]:
    """Returns the sequence id and the submission, without the grammar, of each fork; all share one prompt.

    Raises:
        InvalidRequest: a parameter is out of its range.
    """
    prompt_ids, stop_token_ids = tuple(message.prompt_ids), frozenset(message.stop_token_ids)
    prefill = _prefill_source(message.prefill) if message.HasField("prefill") else None
    sampling = _sampling(message, vocab_size)
    return [
        (
            fork.sequence_id,
            Submission(
                prompt_ids=prompt_ids,
                sampling=replace(sampling, seed=fork.seed),
                max_tokens=message.max_tokens,
                stop_token_ids=stop_token_ids,
                priority=message.priority,
                min_tokens=message.min_tokens,
                prompt_logprobs=fork.prompt_logprobs if fork.HasField("prompt_logprobs") else None,
                cache_salt=message.cache_salt,
                prefill=prefill,
            ),
        )
        for fork in message.forks
    ]


def _prefill_source(message: pb.PrefillSource) -> PrefillSource:
    """Returns the replica that computes a prompt. Raises InvalidRequest where it has no address."""
    if not message.address:
        problem, fix = "is empty, and nobody can be called there", "Send the address of a leader."
        raise InvalidRequest(field="prefill.address", value="", problem=problem, fix=fix)
    return PrefillSource(replica=message.replica, epoch=message.epoch, address=message.address)


def _sampling(message: pb.Submit, vocab_size: int) -> SamplingParams:
    """Returns the sampling parameters that all forks share. Raises InvalidRequest where one is out of its range."""
    sampling = message.sampling
    # Written so that a NaN is out of range too.
    for field, value, fits in (
        ("temperature", sampling.temperature, 0.0 <= sampling.temperature < math.inf),
        ("top_k", sampling.top_k, sampling.top_k >= 0),
        ("top_p", sampling.top_p, 0.0 < sampling.top_p <= 1.0),
        ("min_p", sampling.min_p, 0.0 <= sampling.min_p <= 1.0),
        ("repetition_penalty", sampling.repetition_penalty, 0.0 < sampling.repetition_penalty < math.inf),
        ("presence_penalty", sampling.presence_penalty, math.isfinite(sampling.presence_penalty)),
        ("frequency_penalty", sampling.frequency_penalty, math.isfinite(sampling.frequency_penalty)),
        ("biases", list(sampling.biases), all(map(math.isfinite, sampling.biases))),
        ("bias_ids", list(sampling.bias_ids), all(token_id < vocab_size for token_id in sampling.bias_ids)),
        (
            "bias_ids",
            len(sampling.bias_ids),
            len(set(sampling.bias_ids)) == len(sampling.bias_ids) == len(sampling.biases),
        ),
        ("logprobs", message.logprobs, message.logprobs >= 0),
        *(("prompt_logprobs", fork.prompt_logprobs, fork.prompt_logprobs >= 0) for fork in message.forks),
        ("min_tokens", message.min_tokens, message.min_tokens >= 0),
    ):
        if not fits:
            raise InvalidRequest(
                field=field, value=value, problem="is out of range", fix="The gateway checks it first."
            )
    return SamplingParams(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        bias=tuple(zip(sampling.bias_ids, sampling.biases, strict=True)),
        logprobs=message.logprobs if message.HasField("logprobs") else None,
    )


def step_output(stats: StepStats, outputs: Sequence[Output]) -> pb.StepOutput:
    """Returns the message that carries the part of a step for one stream."""
    return pb.StepOutput(
        step=stats.step,
        sequences=[sequence_output(output) for output in outputs],
        duration_s=stats.duration_s,
        num_tokens=stats.load.num_tokens,
        num_decodes=stats.load.num_decodes,
        num_prefill_tokens=stats.load.num_prefill_tokens,
        decode_context_tokens=stats.load.decode_context_tokens,
        prefill_pairs=stats.load.prefill_pairs,
    )


def sequence_output(output: Output) -> pb.SequenceOutput:
    """Returns the message that carries the part of a step for one sequence."""
    message = pb.SequenceOutput(
        sequence_id=output.sequence_id,
        index=output.index,
        queue_s=output.queue_s,
        prefill_s=output.prefill_s,
        cached_tokens=output.cached_tokens,
        prompt=None if output.scores is None else _prompt_logprobs(output.scores),
        transfer=None if output.transfer is None else _transfer(output.transfer),
    )
    if output.token is not None:
        message.token_id = output.token.token_id
        if output.token.logprob is not None:
            message.logprob = output.token.logprob
            message.top_ids.extend(token_id for token_id, _ in output.token.top)
            message.top_logprobs.extend(logprob for _, logprob in output.token.top)
    if output.end is not None:
        message.end.CopyFrom(
            pb.End(
                reason=_END[output.end],
                detail=output.detail,
                num_preemptions=output.num_preemptions,
                grammar_problem=output.grammar_problem,
            )
        )
    return message


def _transfer(transfer: KvTransfer) -> pb.KvTransfer:
    return pb.KvTransfer(
        num_tokens=transfer.num_tokens,
        num_bytes=transfer.num_bytes,
        queue_s=transfer.queue_s,
        prefill_s=transfer.prefill_s,
        exposed_s=transfer.exposed_s,
        cached_tokens=transfer.cached_tokens,
        by_layer=transfer.by_layer,
        problem=transfer.problem,
    )


def _prompt_logprobs(scores: PromptScores) -> pb.PromptLogprobs:
    return pb.PromptLogprobs(
        first_index=scores.first_index,
        logprobs=scores.logprobs,
        top_ids=[token_id for top in scores.top for token_id, _ in top],
        top_logprobs=[logprob for top in scores.top for _, logprob in top],
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferCounts:
    """The transfers of keys and values to this replica so far.

    Attributes:
        num_transfers: those that came.
        num_failures: those that did not come.
        num_bytes: bytes that came.
        num_refused: pieces that were refused, as their transfer was over or their sender fenced.
    """

    num_transfers: int = 0
    num_failures: int = 0
    num_bytes: int = 0
    num_refused: int = 0


def load_report(
    load: LoadSnapshot,
    *,
    fenced_messages: int,
    budget: StepBudget | None = None,
    transfers: TransferCounts | None = None,
) -> pb.LoadReport:
    """Returns the message by which the heartbeat carries the engine's figures, and the ``budget`` of its steps."""
    counts = transfers or TransferCounts()
    return pb.LoadReport(
        steps=load.steps,
        num_running=load.num_running,
        num_waiting=load.num_waiting,
        free_blocks=load.free_blocks,
        total_blocks=load.total_blocks,
        num_preemptions=load.num_preemptions,
        prompt_tokens=load.prompt_tokens,
        output_tokens=load.output_tokens,
        pending_tokens=load.pending_tokens,
        fenced_messages=fenced_messages,
        prefix_queries=load.prefix_queries,
        prefix_hits=load.prefix_hits,
        budget=None if budget is None else _budget(budget),
        num_moving=load.num_moving,
        kv_transfers=counts.num_transfers,
        kv_failures=counts.num_failures,
        kv_bytes=counts.num_bytes,
        kv_refused=counts.num_refused,
    )


def _budget(budget: StepBudget) -> pb.StepBudget:
    return pb.StepBudget(
        token_budget=budget.token_budget,
        is_auto=budget.is_auto,
        expected_s=budget.expected_s,
        steps=[pb.MeasuredStep(num_tokens=step.num_tokens, duration_s=step.duration_s) for step in budget.times.steps],
    )
