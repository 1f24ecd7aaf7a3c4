"""Carries out an order: stores its keys and values, and attends to what its queries see, layer by layer.

Where queries go ahead, attention to what was there before is computed as soon as they come, then attention to the new
tokens, and both are merged: always so, whichever comes sooner, so that results do not depend on time.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels.attention import PartPlan
from kernels.protocol import Kernels
from placement.serving.offload.orders import StepOrder
from workers.attention_worker.memory import HeldMemory
from workers.attention_worker.messages import KV_ROWS, QUERY_ROWS
from workers.attention_worker.plans import WindowPlan, plan_order
from workers.attention_worker.rows import AnswerRows, InputRows, answer_rows, input_rows
from workers.transport.errors import BadFrame

Part = tuple[Tensor, Tensor]
"""The output of queries over a part of what they see, and its log-sum-exp."""


@dataclass(slots=True, eq=False)
class Attending:
    """An order that is being carried out. Its memory is used for every layer anew.

    Attributes:
        layer: the layer whose rows come next.
        missing: which of its rows have yet to come.
        is_complete: whether all is done in all layers.
    """

    number: int
    order: StepOrder
    memory: HeldMemory
    kernels: Kernels
    layer: int = 0
    rows: InputRows = field(init=False)
    _answer: AnswerRows = field(init=False)
    _slots: Tensor = field(init=False)
    _plans: tuple[WindowPlan, ...] = field(init=False)
    _all: int = field(init=False)
    missing: int = field(init=False)
    _before: Part | None = None

    def __post_init__(self) -> None:
        geometry = self.memory.geometry
        self._plans = plan_order(self.order, self.memory.tables, geometry, self.kernels)
        self.rows = input_rows(geometry, self.order)
        self._answer = answer_rows(geometry, self.order)
        self._slots = torch.tensor(self.order.slots, dtype=torch.int64).to(self.memory.device)
        self._all = (QUERY_ROWS if self.order.spans else 0) | (KV_ROWS if self.order.slots else 0)
        self.missing = self._all

    @property
    def is_complete(self) -> bool:
        """Tells whether it is carried out in all layers."""
        return not self._all or self.layer == self.memory.geometry.num_layers

    def memory_of(self, layer: int, rows: int) -> memoryview:
        """Returns memory for rows of a layer. Raises BadFrame where they are not due."""
        if layer != self.layer or self.is_complete or not rows or rows & ~self.missing:
            raise BadFrame(f"rows {rows} of layer {layer} came where {self.missing} of layer {self.layer} were due")
        if rows == QUERY_ROWS | KV_ROWS:
            return self.rows.both_memory
        return self.rows.query_memory if rows == QUERY_ROWS else self.rows.kv_memory

    def take(self, rows: int) -> memoryview | None:
        """Goes on with rows that have come; returns the answer to the layer's queries once it is computed."""
        layer, device = self.layer, self.memory.device
        self.memory.copy(layer, self.number)
        if rows & KV_ROWS:
            keys, values = self.rows.keys.to(device), self.rows.values.to(device)
            self.kernels.write_kv(self.memory.layers[layer], self._slots, keys, values)
        self.missing &= ~rows
        plan = self._plans[self.memory.geometry.window_of[layer]]
        has_query = self._all & QUERY_ROWS and not self.missing & QUERY_ROWS
        # Without ``new`` all is in ``before``, the rows that this order stores as well.
        if has_query and self._before is None and (self.memory.geometry.q_first or not self.missing):
            self._before = self._attend(plan.before)
        if self.missing:
            return None
        answer = self._finish(plan) if has_query else None
        self.layer, self.missing, self._before = layer + 1, self._all, None
        return answer

    def _attend(self, plan: PartPlan | None) -> Part | None:
        if plan is None:
            return None
        query = self.rows.query.to(self.memory.device)
        return self.kernels.attend_parts(query, self.memory.layers[self.layer], plan, self.memory.geometry.scale)

    def _finish(self, plan: WindowPlan) -> memoryview:
        """Merges the parts, and lays the answer out."""
        answer, num_whole = self._answer, self.order.num_whole
        parts = [part for part in (self._before, self._attend(plan.new)) if part is not None]
        if not parts:
            answer.whole.zero_()
            answer.parts.zero_()
            answer.mass.fill_(-torch.inf)
            return answer.memory
        output, mass = parts[0] if len(parts) == 1 else _merged(*parts)
        if num_whole:
            answer.whole.copy_(output[:num_whole])
        if num_whole < self.order.num_queries:
            answer.parts.copy_(output[num_whole:])
            answer.mass.copy_(mass[num_whole:])
        return answer.memory


def _merged(first: Part, second: Part) -> Part:
    """Merges two parts: in few operations, since the time of each counts in every layer."""
    share = torch.sigmoid(second[1] - first[1]).nan_to_num_(0.0)  # where both see nothing there is no difference
    output = torch.lerp(first[0].float(), second[0].float(), share.unsqueeze(-1))
    return output, torch.logaddexp(first[1], second[1])
