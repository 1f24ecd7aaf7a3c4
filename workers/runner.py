"""Runs one step: lays a batch of sequences side by side, computes it, and samples where it is asked to."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.attention import Run, SequenceSpan
from kernels.reference import rope_tables
from kernels.select import Kernels
from placement.specs import ModelSpec
from workers import decoder
from workers.kv_cache import KVCache
from workers.sampling import SampledToken, SamplingParams, sample


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceInput:
    """One sequence's chunk of a step.

    Attributes:
        token_ids: ids of the chunk.
        start: position of its first token; the tokens before it are in the cache.
        runs: slots of the first ``start + len(token_ids)`` tokens, as contiguous ranges in token order.
        params: how to sample after the chunk; None where the prompt goes on and no token is wanted.
        output_index: how many tokens the sequence was given before.
    """

    token_ids: Sequence[int]
    start: int
    runs: tuple[Run, ...]
    params: SamplingParams | None = None
    output_index: int = 0


class ModelRunner:
    """A whole model on one device. Not thread-safe: steps write to the cache."""

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
        self._weights = decoder.assemble(weights, kernels)
        self._cache = cache
        self._device = device
        self._kernels = kernels
        self._frequencies = decoder.frequencies(model.rope, model.head_dim).to(device)

    def run(self, batch: Sequence[SequenceInput]) -> list[SampledToken | None]:
        """Computes the batch and writes its KV. One entry a sequence: its next token, if it asked for one."""
        asking = [sequence for sequence in batch if sequence.params is not None]
        params = [sequence.params for sequence in asking if sequence.params is not None]
        logits = self.logits(batch)
        tokens = iter(sample(logits, params, [sequence.output_index for sequence in asking]))
        return [None if sequence.params is None else next(tokens) for sequence in batch]

    @torch.inference_mode()
    def logits(self, batch: Sequence[SequenceInput], *, all_positions: bool = False) -> Tensor:
        """Computes the batch and writes its KV.

        Returns:
            Logits [rows, V]: one row for each sequence with ``params``, after its last token; or, for
            ``all_positions``, one for every token.
        """
        tokens = self._flatten(batch)
        hidden = decoder.hidden_states(self._model, self._weights, self._cache.layers, self._kernels, tokens)
        if not all_positions:
            last = [
                span.query_start + span.num_queries - 1
                for span, sequence in zip(tokens.attention.spans, batch, strict=True)
                if sequence.params is not None
            ]
            hidden = hidden[torch.tensor(last, dtype=torch.int64, device=self._device)]
        return decoder.project(self._model, self._weights, self._kernels, hidden)

    def _flatten(self, batch: Sequence[SequenceInput]) -> decoder.TokenBatch:
        """Lays the sequences' chunks side by side."""
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        spans: list[SequenceSpan] = []
        for sequence in batch:
            num_queries = len(sequence.token_ids)
            span = SequenceSpan(query_start=len(token_ids), num_queries=num_queries, runs=sequence.runs)
            spans.append(span)
            token_ids.extend(sequence.token_ids)
            positions.extend(range(sequence.start, sequence.start + num_queries))
            for run in span.query_runs:
                slots.extend(range(*run))
            assert len(slots) == len(positions) == len(token_ids)
        ids, at, where = torch.tensor([token_ids, positions, slots], dtype=torch.int64, device=self._device)
        cos, sin = rope_tables(at, self._frequencies, self._weights.embedding.dtype)
        return decoder.TokenBatch(token_ids=ids, slots=where, cos=cos, sin=sin, attention=self._kernels.plan(spans))
