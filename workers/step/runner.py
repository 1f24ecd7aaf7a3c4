"""Runs steps: has a batch of sequences laid out, computes it, samples, and scores prompts."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from kernels.attention import Attend
from kernels.cpu.layers.layer_works import SPARE_ROWS
from kernels.protocol import Kernels
from placement.measured.overlap import OverlapTable
from placement.model.part import Part
from placement.model.specs import ModelSpec
from workers.model import decoder
from workers.model.decoder_weights import assemble
from workers.model.group import Alone, Group
from workers.model.kv_cache import KVCache
from workers.model.overlapped import Layers, run_alone, run_ladder, run_overlapped
from workers.sampling.grammar import GrammarState, prefetch
from workers.sampling.sampling import SamplerState, sample
from workers.step.graphs import Capture, DecodeGraphs, StepInputs, StepMemory, graph_sizes
from workers.step.layout import Prepared, Sharing, SideBySide, StepLayout, can_overlap, send_integers
from workers.step.scoring import PromptScores, score
from workers.step.types import Batch, NoTeam, SequenceInput, StepResult, Team


class ModelRunner:
    """A model on one device, or a rank's part of it.

    Attributes:
        overlap: which steps the ranks of the stage overlap: at first none.
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
    ) -> None:
        """Takes the tensors out of ``weights``, so that fused copies of them do not double the memory.

        Args:
            part: what the weights are of the model; None: all.
            group: the ranks that compute every layer with this one; None: there are no others.
            team: the ranks that follow this one; None: nobody.
            sharing: with the ranks that share sequences with this one; None: it computes all tokens.
        """
        self._model = model
        self._weights = assemble(model, part or Part.whole(model), weights, kernels)
        self._group: Group = group or Alone()
        self._team: Team = team or NoTeam()
        self._cache = cache
        self._sharing = sharing
        windows = tuple(self._weights.frequencies)  # of this rank's layers
        self._layout: StepLayout
        if sharing is None:
            self._layout = self._side_by_side = SideBySide(kernels=kernels, windows=windows, device=device)
        else:
            self._layout = sharing.layout(windows=windows, cache=cache)
        self._device = device
        self._kernels = kernels
        self.overlap = OverlapTable()
        self._graphs: DecodeGraphs | None = None
        self._beside = ThreadPoolExecutor(1, thread_name_prefix="masks")

    @property
    def hidden_size(self) -> int:
        """E."""
        return self._model.hidden_size

    @property
    def vocab_size(self) -> int:
        """V."""
        return self._model.vocab_size

    @property
    def can_overlap(self) -> bool:
        """Whether steps may be computed in micro-batches: the sums of a ladder hide without."""
        return not self._model.ladder

    @property
    def is_program(self) -> bool:
        """Whether its layers are compiled as one."""
        return self._weights.fused is not None

    @property
    def dtype(self) -> torch.dtype:
        """Of hidden states."""
        return self._weights.dtype

    @torch.inference_mode()
    def prepare(self, batch: Batch) -> Callable[[], StepResult]:
        """Lays the sequences' chunks side by side; calling the result executes the step.

        May run while another step executes; the steps themselves run one at a time, in the order of preparation.
        """
        batch = self.choose(batch)
        number = self._team.announce(batch)
        return partial(self._execute, number, self.lay_out(batch))

    @torch.inference_mode()
    def capture_decodes(self, capture: Capture, *, max_decodes: int, max_tokens: int) -> None:
        """Has steps of decodes alone computed by graphs from now on, where they fit; see :mod:`workers.step.graphs`.

        For the thread that executes steps, between two of them. Writes no KV.

        Args:
            capture: records the steps.
            max_decodes: sequences of the largest step to record.
            max_tokens: tokens that its sequences may have together.
        """
        decode = SequenceInput(token_ids=[0], start=0, runs=((0, 1),))
        like = self.lay_out(Batch(sequences=(decode,))).inputs
        inputs = StepMemory(like=like, max_decodes=graph_sizes(max_decodes)[-1], max_tokens=max_tokens)
        self._graphs = DecodeGraphs(compute=self._all_logits, inputs=inputs, capture=capture)

    def choose(self, batch: Batch) -> Batch:
        """The batch, with how ranks that share sequences exchange. At the leader, who tells the others."""
        return batch if self._sharing is None else self._sharing.choose(batch)

    def lay_out(self, batch: Batch) -> Prepared:
        """Lays the sequences' chunks side by side. May run while another step executes.

        In two micro-batches, where that was measured to be faster: all ranks of a stage have measured the same.
        """
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
        # Which tokens the grammars allow is found out beside the forward pass.
        masks = self.find_masks(prepared)
        logits, scores = self.compute(prepared)
        return self.answer(prepared, logits, scores, masks, started_s)

    def find_masks(self, prepared: Prepared) -> Future[None] | None:
        """Begins to find out which tokens the grammars allow."""
        grammars = [s.grammar for s in prepared.samplers if isinstance(s.grammar, GrammarState)]
        return self._beside.submit(prefetch, grammars, self._model.vocab_size) if grammars else None

    @torch.inference_mode()
    def answer(
        self,
        prepared: Prepared,
        logits: Tensor | None,
        scores: dict[int, PromptScores],
        masks: Future[None] | None,
        started_s: float,
    ) -> StepResult:
        """Samples.

        Args:
            logits: [R, V] of the R rows that a token is sampled after, None where there are none.
            masks: from :meth:`find_masks`.
            started_s: when the step began.
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
            here = [token_ids[index] for index in prepared.awaited]
            prepared.inputs.token_ids[prepared.awaiting_rows] = send_integers(here, self._device)

    @torch.inference_mode()
    def compute(self, prepared: Prepared) -> tuple[Tensor | None, dict[int, PromptScores]]:
        """All of a step but the sampling: what :meth:`finish` gives."""
        inputs, num_sampled = prepared.inputs, prepared.num_sampled
        if self._graphs is not None and num_sampled and not prepared.scored and self._graphs.takes(inputs):
            logits = self._graphs(inputs)
            return (logits if num_sampled == len(logits) else prepared.needed.take(logits)), {}
        return self.finish(prepared, prepared.needed.take(self.forward(prepared)))

    @torch.inference_mode()
    def forward(self, prepared: Prepared, x: Tensor | None = None) -> Tensor:
        """The output [T, E] of this rank's layers, of their input [T, E]; None: of the tokens. Writes the step's KV."""
        y = (
            self._hidden_overlapped(prepared, x)
            if prepared.micro_batches
            else self._hidden(prepared.inputs, x, prepared.attend)
        )
        self._group.settle()
        return y

    @torch.inference_mode()
    def finish(self, prepared: Prepared, hidden: Tensor) -> tuple[Tensor | None, dict[int, PromptScores]]:
        """Logits [R, V] of the R rows that a token is sampled after, None where there are none or this rank follows;
        and scores, by the place of the sequence.

        Args:
            hidden: the last layer's output for ``prepared.needed`` [N, E].
        """
        at = num_sampled = prepared.num_sampled
        scores: dict[int, PromptScores] = {}
        for index, prompt in prepared.scored:
            scores[index] = score(hidden[at : at + len(prompt.token_ids)], self._project, prompt)
            at += len(prompt.token_ids)
        return (self._project(hidden[:num_sampled]) if num_sampled else None), scores

    @torch.inference_mode()
    def logits(self, batch: Batch) -> Tensor:
        """Computes a batch and writes its KV. Logits [T, V] after every token: for tests and measurements."""
        return self._all_logits(self.lay_out(batch).inputs)

    def _all_logits(self, inputs: StepInputs) -> Tensor:
        """Logits [T, V] after every token; at followers [0, V]."""
        logits = self._project(self._hidden(inputs))
        return torch.empty(0, self._model.vocab_size) if logits is None else logits

    def _hidden(self, inputs: StepInputs, x: Tensor | None = None, attend: Attend | None = None) -> Tensor:
        """The last layer's output [T, E]."""
        if x is None:
            x = self._embed(inputs)
        layers = self.run_layers(inputs, x, attend, in_program=True)
        if self._model.ladder:
            return run_ladder(layers, self._group.begin_reduce)
        return run_alone(layers, self._group.reduce)

    def _hidden_overlapped(self, prepared: Prepared, x: Tensor | None) -> Tensor:
        """The last layer's output [T, E], in two micro-batches."""
        if x is None:
            x = self._embed(prepared.inputs)
        return torch.cat(run_overlapped(self.micro_batches(prepared, x), self._group.begin_reduce))

    def _embed(self, inputs: StepInputs) -> Tensor:
        assert self._weights.ends is not None, "only the first stage has the embedding"
        return decoder.embed(self._model, self._weights.ends, self._kernels, self._group, inputs.token_ids)

    def micro_batches(self, prepared: Prepared, x: Tensor, num_layers: int | None = None) -> list[Layers]:
        """Each micro-batch of an overlapped step of input ``x`` [T, E], not yet begun."""
        first, second = (len(micro_batch.token_ids) for micro_batch in prepared.micro_batches)
        behind = first + SPARE_ROWS
        if self._weights.fused is not None:
            self._weights.fused.reserve(behind + second)
        return [
            self.run_layers(prepared.micro_batches[0], x[:first], num_layers=num_layers),
            self.run_layers(prepared.micro_batches[1], x[first:], first_row=behind, num_layers=num_layers),
        ]

    def run_layers(
        self,
        inputs: StepInputs,
        x: Tensor,
        attend: Attend | None = None,
        *,
        first_row: int = 0,
        in_program: bool = False,
        num_layers: int | None = None,
    ) -> Layers:
        """This rank's layers of input ``x`` [T, E]: see :func:`workers.model.decoder.run_layers`.

        What turns the tokens is computed here, by the executing thread's team.

        Args:
            in_program: sums may be left to the program, since nothing else is to be computed meanwhile.
            num_layers: only the first ones are computed, for a measurement.
        """
        group = self._group
        within = in_program and group.sums and not self._model.ladder
        sum_work = group.in_program(x.nbytes) if within else None
        tokens = decoder.TokenBatch(
            token_ids=inputs.token_ids,
            slots=inputs.slots,
            rope=decoder.rope_tables(self._model, self._weights, inputs.positions),
            attention=inputs.attention,
            attend=attend,
        )
        layers = self._cache.layers
        return decoder.run_layers(
            self._model,
            self._weights,
            layers,
            self._kernels,
            tokens,
            x,
            sums=group.sums,
            sum_work=sum_work,
            first_row=first_row,
            num_layers=num_layers,
        )

    def _project(self, hidden: Tensor) -> Tensor | None:
        """Logits [rows, V] of hidden states [rows, E]; None at followers."""
        assert self._weights.ends is not None
        return decoder.project(self._model, self._weights.ends, self._kernels, self._group, hidden)


def newest(samplers: Sequence[SamplerState]) -> list[int]:
    """The token that each was last given. A sequence whose sampling failed has none: what is computed of it is lost."""
    return [0 if sampler.last_token_id is None else sampler.last_token_id for sampler in samplers]


def _is_complete(sequence: SequenceInput) -> bool:
    """Whether the token that the step gave the sequence was the last that its grammar allows."""
    return sequence.sampler is not None and sequence.sampler.grammar is not None and sequence.sampler.grammar.done
