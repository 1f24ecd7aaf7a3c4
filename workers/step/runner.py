"""Runs steps: it has a batch of sequences laid out, computes it, and samples."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from kernels.protocol import Kernels
from placement.measured.overlap import OverlapTable
from placement.model.part import Part
from placement.model.specs import ModelSpec
from workers.model.group import Group
from workers.model.kv_cache import KVCache
from workers.sampling.grammar import GrammarState, prefetch
from workers.sampling.sampling import SamplerState, sample
from workers.step.forward import Forward
from workers.step.graphs import Capture, DecodeGraphs, StepMemory, graph_sizes
from workers.step.layout import Offload, Prepared, Sharing, SideBySide, StepLayout, can_overlap, send_integers
from workers.step.scoring import PromptScores
from workers.step.types import Batch, NoTeam, SequenceInput, Shipper, StepResult, Team


class ModelRunner(Forward):
    """A model on one device, or a rank's part of it, that runs the steps of a replica.

    Attributes:
        overlap: the measurements that say which steps the ranks of the stage overlap; at first none.
    """

    def __init__(
        self,
        *,
        model: ModelSpec,
        weights: dict[str, Tensor],
        cache: KVCache,
        device: torch.device,
        kernels: Kernels,
        part: Part | None = None,
        group: Group | None = None,
        team: Team | None = None,
        sharing: Sharing | None = None,
        shipper: Shipper | None = None,
        offload: Offload | None = None,
    ) -> None:
        """Takes the tensors out of ``weights``: see :class:`Forward`.

        Args:
            team: the ranks that follow this one; None: there are none.
            sharing: the exchange with the ranks that share sequences with this one; None: it computes all tokens.
            offload: the attention workers that hold keys and values; None: this rank holds all of them.
        """
        super().__init__(
            model=model, weights=weights, cache=cache, kernels=kernels, part=part, group=group, shipper=shipper
        )
        self._team: Team = team or NoTeam()
        self._sharing = sharing
        windows = tuple(self._weights.frequencies)  # of this rank's layers
        self._offload = offload
        self._layout: StepLayout
        if offload is not None:
            self._layout = offload.layout(kernels=kernels, device=device)
        elif sharing is None:
            self._layout = self._side_by_side = SideBySide(kernels=kernels, windows=windows, device=device)
        else:
            self._layout = sharing.layout(windows=windows, cache=cache)
        self._device = device
        self.overlap = OverlapTable()
        self._graphs: DecodeGraphs | None = None
        self._mask_thread = ThreadPoolExecutor(1, thread_name_prefix="masks")

    @torch.inference_mode()
    def prepare(self, batch: Batch) -> Callable[[], StepResult]:
        """Lays the sequences' chunks side by side. A call of the result executes the step.

        It may run while another step executes. The steps themselves run one at a time, in the order of preparation.
        """
        batch = self.choose(batch)
        number = self._team.announce(batch)
        return partial(self._execute, number, self.lay_out(batch))

    @torch.inference_mode()
    def capture_decodes(self, capture: Capture, *, max_decodes: int, max_tokens: int) -> None:
        """Has graphs compute steps of decodes alone from now on, where they fit; see :mod:`workers.step.graphs`.

        Call it on the thread that executes steps, between two of them. It writes no KV.

        Args:
            capture: records the steps.
            max_decodes: sequences of the largest step to record.
            max_tokens: tokens that its sequences may have together.
        """
        decode = SequenceInput(token_ids=[0], start=0, runs=((0, 1),))
        like = self.lay_out(Batch(sequences=(decode,))).inputs
        inputs = StepMemory(like=like, max_decodes=graph_sizes(max_decodes)[-1], max_tokens=max_tokens)
        self._graphs = DecodeGraphs(compute=self._all_logits, inputs=inputs, capture=capture)

    @property
    def can_overlap(self) -> bool:
        """Tells whether steps may be split into micro-batches by their tokens."""
        return super().can_overlap and self._offload is None

    def recover(self) -> None:
        """Has attention workers hold keys and values again: see :class:`workers.engine.types.Recovering`."""
        assert self._offload is not None, "nobody else holds keys and values"
        self._offload.recover()

    def choose(self, batch: Batch) -> Batch:
        """Adds the exchange of ranks that share sequences to a batch. The leader calls it, and tells the others."""
        return batch if self._sharing is None else self._sharing.choose(batch)

    def lay_out(self, batch: Batch) -> Prepared:
        """Lays the sequences' chunks side by side. It may run while another step executes.

        Where that was measured to be faster, it makes two micro-batches: all ranks of a stage have measured the same.
        It ends the transfers that are over, before the step, or one after it, uses their blocks.
        """
        if self._shipper is not None:
            for transfer_id in batch.closed:
                self._shipper.close(transfer_id)
        if self.overlap.pays(batch.num_tokens) and can_overlap(batch):
            return self.lay_out_overlapped(batch)
        return self._layout.lay_out(batch)

    def lay_out_overlapped(self, batch: Batch) -> Prepared:
        """Lays the batch out in two micro-batches, for which it has enough tokens. Not where ranks share sequences."""
        return self._side_by_side.lay_out(batch, is_overlapped=True)

    @torch.inference_mode()
    def _execute(self, number: int, prepared: Prepared) -> StepResult:
        """Computes the step, writes its KV and samples."""
        started_s = time.monotonic()
        awaited = newest(prepared.awaiting)
        self._team.begin(number, awaited)
        self.put_awaited(prepared, awaited)
        # Another thread finds the tokens that the grammars allow during the forward pass.
        masks = self.find_masks(prepared)
        logits, scores = self.compute(prepared)
        return self.answer(prepared, logits, scores, masks, started_s)

    def find_masks(self, prepared: Prepared) -> Future[None] | None:
        """Starts to find the tokens that the grammars allow; None where no sequence has a grammar."""
        grammars = [s.grammar for s in prepared.samplers if isinstance(s.grammar, GrammarState)]
        return self._mask_thread.submit(prefetch, grammars, self._model.vocab_size) if grammars else None

    @torch.inference_mode()
    def answer(
        self,
        prepared: Prepared,
        logits: Tensor | None,
        scores: dict[int, PromptScores],
        masks: Future[None] | None,
        started_s: float,
    ) -> StepResult:
        """Samples, and returns what the step gave.

        Args:
            logits: [R, V] of the R rows that a token is sampled after; None where there are none.
            masks: the future from :meth:`find_masks`.
            started_s: the time when the step began.
        """
        if masks is not None:
            masks.result()
        sampled = iter(() if logits is None else sample(logits, prepared.samplers))
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
    def put_awaited(self, prepared: Prepared, token_ids: Sequence[int]) -> None:
        """Puts the tokens that a step awaited in their places."""
        if prepared.awaited:
            own = [token_ids[index] for index in prepared.awaited]
            prepared.inputs.token_ids[prepared.awaiting_rows] = send_integers(own, self._device)

    @torch.inference_mode()
    def compute(self, prepared: Prepared) -> tuple[Tensor | None, dict[int, PromptScores]]:
        """Computes all of a step but the sampling, and returns what :meth:`finish` returns."""
        inputs, num_sampled = prepared.inputs, prepared.num_sampled
        is_plain = num_sampled and not prepared.scored and not any(s.ship for s in prepared.batch.sequences)
        if self._graphs is not None and is_plain and self._graphs.can_run(inputs):
            logits = self._graphs(inputs)
            return (logits if num_sampled == len(logits) else prepared.needed.take(logits)), {}
        return self.finish(prepared, prepared.needed.take(self.forward(prepared)))

    @torch.inference_mode()
    def logits(self, batch: Batch) -> Tensor:
        """Computes a batch, writes its KV, and returns logits [T, V] after every token: for tests and measurements."""
        logits = self._project(self.forward(self.lay_out(batch)))
        return torch.empty(0, self._model.vocab_size) if logits is None else logits


def newest(samplers: Sequence[SamplerState]) -> list[int]:
    """Returns the newest token of each sequence.

    A sequence whose sampling failed may have none; what is computed of it is thrown away.
    """
    return [0 if sampler.last_token_id is None else sampler.last_token_id for sampler in samplers]


def _is_complete(sequence: SequenceInput) -> bool:
    """Tells whether the token that the step gave the sequence was the last that its grammar allows."""
    return sequence.sampler is not None and sequence.sampler.grammar is not None and sequence.sampler.grammar.done
