"""Runs steps: lays a batch of sequences side by side, computes it, samples, and scores prompts.

A step is prepared on one thread while the step before it computes on another. What a sequence was given by that step
is not known yet when it is prepared; it is put in its place when the step begins.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from kernels.attention import Run, SequenceSpan, SharedSpan
from kernels.select import Kernels
from placement.specs import ModelSpec
from workers import decoder
from workers.grammar import GrammarState, prefetch
from workers.kv_cache import KVCache
from workers.sampling import SampledToken, SamplerState, SamplingFailed, sample
from workers.scoring import PromptScores, ScoredPrompt, score


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceInput:
    """One sequence's chunk of a step.

    Attributes:
        token_ids: ids of the chunk, as far as they are known.
        start: position of its first token; the tokens before it are in the cache.
        runs: slots of all tokens up to the chunk's last, as contiguous ranges in token order.
        awaits_token: the chunk has one more token, the one that the step before samples with ``sampler``.
        sampler: how to sample after the chunk.
        samples: whether to; the prompt may go on.
        scored: the prompt's tokens whose log-probabilities are wanted.
    """

    token_ids: Sequence[int]
    start: int
    runs: tuple[Run, ...]
    awaits_token: bool = False
    sampler: SamplerState | None = None
    samples: bool = False
    scored: ScoredPrompt | None = None

    def __post_init__(self) -> None:
        assert self.sampler is not None or not (self.samples or self.awaits_token), self

    @property
    def num_tokens(self) -> int:
        """Tokens of the chunk."""
        return len(self.token_ids) + self.awaits_token


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What a step computes.

    Attributes:
        shared: runs of KV that several of the sequences have in common, by their place in ``sequences``.
    """

    sequences: tuple[SequenceInput, ...]
    shared: tuple[SharedSpan, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prepared:
    """A step laid out for the device.

    Attributes:
        tokens: all but what turns them, which the executing thread computes with its own team of threads.
        positions: of the tokens, [T].
        awaiting: samplers that know, when the step begins, the token of as many ``awaiting_rows``.
        rows: rows of ``tokens`` after which a token is sampled.
        samplers: how, one for each of ``rows``.
        scored: first row and prompt of what is scored, with the place of its sequence.
    """

    batch: Batch
    tokens: decoder.TokenBatch
    positions: Tensor
    awaiting: tuple[SamplerState, ...]
    awaiting_rows: Tensor
    rows: Tensor
    samplers: tuple[SamplerState, ...]
    scored: tuple[tuple[int, int, ScoredPrompt], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What a step gave, by the place of the sequence in its batch.

    Attributes:
        tokens: the next token of each sequence that asked for one.
        complete: sequences whose grammar the token completed.
        scores: the prompt tokens that were scored.
        duration_s: time that the device took.
    """

    tokens: tuple[SampledToken | SamplingFailed | None, ...]
    complete: frozenset[int] = frozenset()
    scores: dict[int, PromptScores] = field(default_factory=dict)
    duration_s: float = 0.0


class ModelRunner:
    """A whole model on one device."""

    def __init__(
        self,
        *,
        model: ModelSpec,
        weights: dict[str, Tensor],
        cache: KVCache,
        device: torch.device,
        kernels: Kernels,
    ) -> None:
        """Takes the tensors out of ``weights``, so that fused copies of them do not double the memory."""
        self._model = model
        self._weights = decoder.assemble(model, weights, kernels)
        self._cache = cache
        self._device = device
        self._kernels = kernels
        self._beside = ThreadPoolExecutor(1, thread_name_prefix="masks")

    @torch.inference_mode()
    def prepare(self, batch: Batch) -> Callable[[], StepResult]:
        """Lays the sequences' chunks side by side; calling the result executes the step.

        May run while another step executes; the steps themselves run one at a time, in the order of preparation.
        """
        return partial(self._execute, self._lay_out(batch))

    def _lay_out(self, batch: Batch) -> _Prepared:
        spans = _spans(batch)
        tokens, positions = self._flatten(batch, spans)
        last = [span.query_start + span.num_queries - 1 for span in spans]
        placed = list(zip(batch.sequences, spans, last, strict=True))
        return _Prepared(
            batch=batch,
            tokens=tokens,
            positions=positions,
            awaiting=tuple(s.sampler for s in batch.sequences if s.awaits_token and s.sampler is not None),
            awaiting_rows=self._indices([row for s, _, row in placed if s.awaits_token]),
            rows=self._indices([row for s, _, row in placed if s.samples]),
            samplers=tuple(s.sampler for s in batch.sequences if s.samples and s.sampler is not None),
            scored=tuple(
                (index, span.query_start + s.scored.first_index - 1 - s.start, s.scored)
                for index, (s, span, _) in enumerate(placed)
                if s.scored is not None
            ),
        )

    @torch.inference_mode()
    def _execute(self, prepared: _Prepared) -> StepResult:
        """Computes the step, writes its KV and samples."""
        started_s = time.monotonic()
        tokens, samplers = self._turned(prepared), prepared.samplers
        if prepared.awaiting:
            tokens.token_ids[prepared.awaiting_rows] = self._indices(_newest(prepared.awaiting))
        # Which tokens the grammars allow is found out beside the forward pass.
        grammars = [s.grammar for s in samplers if isinstance(s.grammar, GrammarState)]
        masks = self._beside.submit(prefetch, grammars, self._model.vocab_size) if grammars else None
        hidden = decoder.hidden_states(self._model, self._weights, self._cache.layers, self._kernels, tokens)
        if masks is not None:
            masks.result()
        scores = {
            index: score(hidden[row : row + len(prompt.token_ids)], self._project, prompt)
            for index, row, prompt in prepared.scored
        }
        sampled = iter(sample(self._project(hidden[prepared.rows]), samplers) if samplers else ())
        sequences = prepared.batch.sequences
        return StepResult(
            tokens=tuple(next(sampled) if sequence.samples else None for sequence in sequences),
            complete=frozenset(
                i for i, sequence in enumerate(sequences) if sequence.samples and _is_complete(sequence)
            ),
            scores=scores,
            duration_s=time.monotonic() - started_s,
        )

    @torch.inference_mode()
    def logits(self, batch: Batch) -> Tensor:
        """Computes a batch and writes its KV. Logits [T, V] after every token: for tests and measurements."""
        tokens = self._turned(self._lay_out(batch))
        hidden = decoder.hidden_states(self._model, self._weights, self._cache.layers, self._kernels, tokens)
        return self._project(hidden)

    def _indices(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)

    def _project(self, hidden: Tensor) -> Tensor:
        """Logits [rows, V] of hidden states [rows, E]."""
        return decoder.project(self._model, self._weights, self._kernels, hidden)

    def _turned(self, prepared: _Prepared) -> decoder.TokenBatch:
        """The step's tokens with what turns them by their positions."""
        return replace(prepared.tokens, rope=decoder.rope_tables(self._model, self._weights, prepared.positions))

    def _flatten(self, batch: Batch, spans: Sequence[SequenceSpan]) -> tuple[decoder.TokenBatch, Tensor]:
        """Token ids, slots and attention of the batch, and its positions; a token that is awaited is 0."""
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        for sequence, span in zip(batch.sequences, spans, strict=True):
            token_ids.extend(sequence.token_ids)
            if sequence.awaits_token:
                token_ids.append(0)
            positions.extend(range(sequence.start, sequence.start + span.num_queries))
            for run in span.query_runs:
                slots.extend(range(*run))
            assert len(slots) == len(positions) == len(token_ids), sequence
        ids, at, where = torch.tensor([token_ids, positions, slots], dtype=torch.int64, device=self._device)
        windows = self._model.distinct_windows
        tokens = decoder.TokenBatch(
            token_ids=ids,
            slots=where,
            rope={},
            attention={w: self._kernels.plan(spans, window=w, shared=batch.shared) for w in windows},
        )
        return tokens, at


def _spans(batch: Batch) -> list[SequenceSpan]:
    """Where each sequence's chunk lies in the batch."""
    spans: list[SequenceSpan] = []
    start = 0
    for sequence in batch.sequences:
        spans.append(SequenceSpan(query_start=start, num_queries=sequence.num_tokens, runs=sequence.runs))
        start += sequence.num_tokens
    return spans


def _newest(samplers: Sequence[SamplerState]) -> list[int]:
    """The token that each was last given. A sequence whose sampling failed has none: what is computed of it is lost."""
    return [0 if sampler.last_token_id is None else sampler.last_token_id for sampler in samplers]


def _is_complete(sequence: SequenceInput) -> bool:
    """Whether the token that the step gave the sequence was the last that its grammar allows."""
    return sequence.sampler is not None and sequence.sampler.grammar is not None and sequence.sampler.grammar.done
