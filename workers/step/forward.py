"""Computes a rank's layers, and the logits, of steps that are laid out.

Shapes: T tokens of a step, E hidden size, V vocabulary, R rows that a token is sampled after.
"""

import torch
from torch import Tensor

from kernels.attention import Attend
from kernels.cpu.layers.layer_works import SPARE_ROWS
from kernels.protocol import Kernels
from placement.model.part import Part
from placement.model.specs import ModelSpec
from workers.model import decoder
from workers.model.decoder_weights import assemble
from workers.model.group import Alone, Group
from workers.model.kv_cache import KVCache
from workers.model.overlapped import Layers, run_alone, run_ladder, run_overlapped
from workers.model.progress import LayerProgress, OnLayer
from workers.step.graphs import StepInputs
from workers.step.layout import Prepared
from workers.step.scoring import PromptScores, score
from workers.step.types import Shipper


class Forward:
    """A model on one device, or a rank's part of it, without sampling."""

    def __init__(
        self,
        *,
        model: ModelSpec,
        weights: dict[str, Tensor],
        cache: KVCache,
        kernels: Kernels,
        part: Part | None = None,
        group: Group | None = None,
        shipper: Shipper | None = None,
    ) -> None:
        """Takes the tensors out of ``weights``, so that fused copies of them do not double the memory.

        Args:
            part: the part of the model that the weights are; None: all of it.
            group: the ranks that compute every layer with this one; None: there are no others.
            shipper: sends keys and values to other replicas; None: no step has any for them.
        """
        self._model = model
        self._weights = assemble(model, part or Part.whole(model), weights, kernels)
        self._cache = cache
        self._kernels = kernels
        self._group: Group = group or Alone()
        self._shipper = shipper

    @property
    def hidden_size(self) -> int:
        """Returns the size of hidden states (E)."""
        return self._model.hidden_size

    @property
    def dtype(self) -> torch.dtype:
        """Returns the number type of hidden states."""
        return self._weights.dtype

    @property
    def can_overlap(self) -> bool:
        """Tells whether steps may be split into micro-batches. A ladder hides its all-reduces without."""
        return not self._model.ladder

    @property
    def is_program(self) -> bool:
        """Tells whether the layers are compiled as one program."""
        return self._weights.fused is not None

    @torch.inference_mode()
    def forward(self, prepared: Prepared, x: Tensor | None = None) -> Tensor:
        """Runs this rank's layers on their input ``x`` [T, E], or on the step's tokens where it is None.

        It writes the step's KV, and sends on what goes to other replicas. It returns the output [T, E].
        """
        if self._shipper is None or not any(sequence.ship for sequence in prepared.batch.sequences):
            return self._forward(prepared, x, None)
        by_layer, at_end = LayerProgress(), LayerProgress()
        for sequence in prepared.batch.sequences:
            if sequence.ship is not None:
                self._shipper.ship(sequence.ship, sequence.runs, by_layer if sequence.ship.by_layer else at_end)
        try:
            y = self._forward(prepared, x, by_layer)
        except BaseException:
            by_layer.fail()
            at_end.fail()
            raise
        by_layer.finish()
        at_end.finish()
        return y

    def _forward(self, prepared: Prepared, x: Tensor | None, progress: LayerProgress | None) -> Tensor:
        if prepared.micro_batches:
            y = self._hidden_overlapped(prepared, x, progress)
        else:
            y = self._hidden(prepared.inputs, x, prepared.attend, None if progress is None else progress.advance)
        self._group.settle()
        if prepared.computed is not None:
            prepared.computed()
        return y

    @torch.inference_mode()
    def finish(self, prepared: Prepared, hidden: Tensor) -> tuple[Tensor | None, dict[int, PromptScores]]:
        """Computes logits, and scores prompts.

        Args:
            hidden: the last layer's output for ``prepared.needed`` [N, E].

        Returns:
            The logits [R, V], or None where nothing is sampled or this rank follows; and the scores, by the place of
            the sequence.
        """
        first = num_sampled = prepared.num_sampled
        scores: dict[int, PromptScores] = {}
        for index, prompt in prepared.scored:
            scores[index] = score(hidden[first : first + len(prompt.token_ids)], self._project, prompt)
            first += len(prompt.token_ids)
        return (self._project(hidden[:num_sampled]) if num_sampled else None), scores

    def micro_batches(
        self,
        prepared: Prepared,
        x: Tensor,
        num_layers: int | None = None,
        on_layer: OnLayer | None = None,
    ) -> list[Layers]:
        """Starts the layers of each micro-batch of an overlapped step with input ``x`` [T, E]; none is computed yet.

        ``on_layer`` is told of the layers of the second, which come last.
        """
        first, second = (len(inputs.token_ids) for inputs in prepared.micro_batches)
        behind = first + SPARE_ROWS
        if self._weights.fused is not None:
            self._weights.fused.reserve(behind + second)
        one, two = prepared.attends or (None, None)
        return [
            self.run_layers(prepared.micro_batches[0], x[:first], one, num_layers=num_layers),
            self.run_layers(
                prepared.micro_batches[1], x[first:], two, first_row=behind, num_layers=num_layers, on_layer=on_layer
            ),
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
        on_layer: OnLayer | None = None,
    ) -> Layers:
        """Starts this rank's layers with input ``x`` [T, E]: see :func:`workers.model.decoder.run_layers`.

        The rotation of the tokens is computed at once, by the team of the executing thread.

        Args:
            in_program: whether all-reduces may be left to the program, since nothing else is computed meanwhile.
            num_layers: the number of layers to compute, from the first on, for a measurement.
            on_layer: is told of each layer whose KV is written.
        """
        batch = decoder.TokenBatch(
            token_ids=inputs.token_ids,
            slots=inputs.slots,
            rope=decoder.rope_tables(self._model, self._weights, inputs.positions),
            attention=inputs.attention,
            attend=attend,
            on_layer=on_layer,
        )
        # A program that stops for attention cannot sum: all ranks of the stage stop, or none.
        in_program = in_program and attend is None and self._group.sums and not self._model.ladder
        return decoder.run_layers(
            *(self._model, self._weights, self._cache.layers, self._kernels, batch, x),
            sums=self._group.sums,
            sum_work=self._group.in_program(x.nbytes) if in_program else None,
            first_row=first_row,
            num_layers=num_layers,
        )

    def _hidden(
        self,
        inputs: StepInputs,
        x: Tensor | None = None,
        attend: Attend | None = None,
        on_layer: OnLayer | None = None,
    ) -> Tensor:
        """Computes the last layer's output [T, E]."""
        if x is None:
            x = self._embed(inputs)
        layers = self.run_layers(inputs, x, attend, in_program=True, on_layer=on_layer)
        if self._model.ladder:
            return run_ladder(layers, self._group.begin_reduce)
        return run_alone(layers, self._group.reduce)

    def _hidden_overlapped(self, prepared: Prepared, x: Tensor | None, progress: LayerProgress | None) -> Tensor:
        """Computes the last layer's output [T, E] in two micro-batches."""
        if x is None:
            x = self._embed(prepared.inputs)
        on_layer = None if progress is None else progress.advance
        return torch.cat(run_overlapped(self.micro_batches(prepared, x, on_layer=on_layer), self._group.begin_reduce))

    def _embed(self, inputs: StepInputs) -> Tensor:
        assert self._weights.ends is not None, "only the first stage has the embedding"
        return decoder.embed(self._model, self._weights.ends, self._kernels, self._group, inputs.token_ids)

    def _project(self, hidden: Tensor) -> Tensor | None:
        """Computes logits [rows, V] of hidden states [rows, E]; None at followers."""
        assert self._weights.ends is not None, "only the first stage has the output head"
        return decoder.project(self._model, self._weights.ends, self._kernels, self._group, hidden)

    def _all_logits(self, inputs: StepInputs) -> Tensor:
        """Computes logits [T, V] after every token; [0, V] at followers."""
        logits = self._project(self._hidden(inputs))
        return torch.empty(0, self._model.vocab_size) if logits is None else logits
