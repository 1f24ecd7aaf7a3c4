"""Runners whose keys and values attention workers hold, and sequences that both they and plain ones compute."""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from kernels import reference
from kernels.attention import LayerCache, PartSpan
from kernels.protocol import Kernels
from kernels.select import kernels_for
from placement.model.hf import read_model_spec
from placement.model.part import Span
from placement.model.weights import whole_model
from placement.planning.residency import Residency
from placement.serving.offload.deltas import apply
from placement.serving.offload.orders import Geometry, StepOrder
from placement.serving.offload.residents import SessionPlace, session_places
from workers.attention_worker.plans import plan_order
from workers.attention_worker.session import AttentionResult, AttentionSession, Welcome, WireCounts
from workers.host.device import open_device
from workers.model.decoder_weights import attention_scale
from workers.model.kv_cache import allocate_kv_cache
from workers.offload.layout import OffloadLayout, OffloadShape
from workers.offload.sessions import geometries
from workers.startup.checkpoint import load_weights
from workers.step.runner import ModelRunner
from workers.step.types import Batch, SequenceInput

BLOCK_SIZE, NUM_BLOCKS, TOKEN_BUDGET = 8, 120, 256
Connect = Callable[[SessionPlace, Geometry], AttentionSession]


@dataclass(kw_only=True)
class DenseSession:
    """A session with nobody: it keeps all keys and values itself, and computes when it is asked for answers.

    Attributes:
        orders: all that it was told, the newest last.
    """

    geometry: Geometry
    orders: list[StepOrder] = field(default_factory=list)
    counts: WireCounts = field(default_factory=WireCounts)
    welcome: Welcome = field(default_factory=lambda: Welcome(resumed=False, last_complete=-1, names={}))

    def __post_init__(self) -> None:
        shape, dtype = self.geometry, torch.float32 if self.geometry.itemsize == 4 else torch.bfloat16
        size = (shape.num_kv_heads, shape.num_blocks * shape.width, shape.head_dim)
        self.layers = [
            LayerCache(keys=torch.full(size, torch.nan, dtype=dtype), values=torch.full(size, torch.nan, dtype=dtype))
            for _ in range(shape.num_layers)
        ]
        self.tables: dict[int, tuple[int, ...]] = {}
        self.plans: list[list[Sequence[PartSpan]]] = []
        self.found: dict[tuple[int, int], AttentionResult] = {}

    def order(self, order: StepOrder) -> int:
        self.tables = apply(self.tables, order.tables, num_blocks=self.geometry.num_blocks)
        windows = plan_order(order, self.tables, self.geometry, reference)
        self.plans.append([[span for it in (own.before, own.new) if it for span in it.spans] for own in windows])
        self.orders.append(order)
        return len(self.orders) - 1

    def send(self, number: int, layer: int, query: Tensor | None, keys: Tensor | None, values: Tensor | None) -> None:
        shape, order, cache = self.geometry, self.orders[number], self.layers[layer]
        assert (keys is not None) == bool(order.slots) and (query is not None) == bool(order.spans)
        if keys is not None and values is not None:
            assert keys.shape == values.shape == (len(order.slots), shape.num_kv_heads, shape.head_dim)
            reference.write_kv(cache, torch.tensor(order.slots), keys, values)
        if query is not None:
            assert query.shape == (order.num_queries, shape.num_heads, shape.head_dim)
            plan = reference.plan_parts(self.plans[number][shape.window_of[layer]])
            output, mass = self._attend(query, cache, plan.spans)
            whole = output[: order.num_whole].to(query.dtype)
            result = AttentionResult(whole=whole, parts=output[order.num_whole :], mass=mass[order.num_whole :])
            self.found[number, layer] = result

    def _attend(self, query: Tensor, cache: LayerCache, spans: Sequence[PartSpan]) -> tuple[Tensor, Tensor]:
        wide = LayerCache(keys=cache.keys.float(), values=cache.values.float())
        parts = [
            reference.attend_parts(query.float(), wide, reference.plan_parts([span]), self.geometry.scale)
            for span in spans
        ]
        nothing = torch.zeros(query.shape), torch.full(query.shape[:2], -torch.inf)
        outputs, masses = zip(nothing, *parts, strict=True)
        output, mass = reference.merge_partials(outputs, masses)
        return output.nan_to_num(0.0), mass

    def result(self, number: int, layer: int) -> AttentionResult:
        return self.found.pop((number, layer))

    def flush(self) -> None: ...

    def close(self) -> None: ...


@dataclass(kw_only=True)
class Offloaded:
    """Implements the runner's Offload with sessions of a test."""

    shape: OffloadShape
    windows: tuple[int | None, ...]
    sessions: list[AttentionSession]

    def layout(self, *, kernels: Kernels, device: torch.device) -> OffloadLayout:
        return OffloadLayout(self.shape, kernels=kernels, windows=self.windows, device=device, sessions=self.sessions)

    def recover(self) -> None:
        raise NotImplementedError


def offloaded_runner(
    path: Path,
    residency: Residency,
    connect: Connect,
    *,
    dtype: torch.dtype = torch.float32,
    staggered: bool = True,
    q_first: bool = False,
    kernels: Kernels | None = None,
) -> ModelRunner:
    """A runner with the blocks of a residency, whose sessions ``connect`` opens."""
    device, model = open_device("cpu", 1), read_model_spec(json.loads((path / "config.json").read_text()))
    layer_windows = [layer.attention.window for layer in model.layers]
    windows = tuple(dict.fromkeys(layer_windows))
    places = session_places(residency, Span(0, model.num_kv_heads))
    shapes = geometries(
        places,
        num_blocks=[len(residency.regions[place.region].blocks) for place in places],
        block_size=BLOCK_SIZE,
        queries_per_kv_head=model.queries_per_kv_head,
        head_dim=model.head_dim,
        itemsize=dtype.itemsize,
        layer_windows=layer_windows,
        windows=windows,
        scale=attention_scale(model),
        q_first=q_first,
    )
    num_local = residency.num_local_blocks * BLOCK_SIZE
    shape = OffloadShape(
        residency=residency,
        places=places,
        block_size=BLOCK_SIZE,
        queries_per_kv_head=model.queries_per_kv_head,
        first_staged=num_local,
        staggered=staggered,
    )
    return ModelRunner(
        model=model,
        weights=load_weights(path, whole_model(model), dtype, device.torch_device, lambda loaded, total: None),
        cache=allocate_kv_cache(
            model, num_slots=num_local + TOKEN_BUDGET, dtype=dtype, device=device, one_for_all=not num_local
        ),
        device=device.torch_device,
        kernels=kernels or kernels_for("cpu"),
        offload=Offloaded(shape=shape, windows=windows, sessions=list(map(connect, places, shapes))),
    )


def steps(residency: Residency, seed: int, count: int = 14) -> list[Batch]:
    """Steps of prompts in chunks beside decodes. Some sequences begin with another one's blocks, some begin anew.

    Each sequence has its blocks in one region or in any.
    """
    draw = random.Random(seed)
    pools = [list(range(region.blocks.start, region.blocks.stop)) for region in residency.regions]
    for pool in pools:
        draw.shuffle(pool)
    texts: dict[int, list[int]] = {number: [] for number in range(4)}
    tables: dict[int, list[int]] = {number: [] for number in texts}
    homes = {number: draw.choice([*pools, None]) for number in texts}
    made = []
    for step in range(count):
        if step == count // 2:  # one goes on as a fork of another; the blocks of a third are lost
            whole = len(texts[0]) // BLOCK_SIZE
            texts[9], tables[9], homes[9] = texts[0][: whole * BLOCK_SIZE], tables[0][:whole], homes[0]
            texts[1], tables[1] = [], []
        chunks = []
        for number, text in texts.items():
            size = draw.choice([0, 1, 1, 1, 5, 13]) if text and step % 3 else draw.choice([1, 2, 17])
            room = [pool for pool in pools if pool]
            if not size or len(text) + size > 70 or sum(map(len, pools)) < 12:
                continue
            new = [draw.randrange(3, 480) for _ in range(size)]
            while len(tables[number]) * BLOCK_SIZE < len(text) + size:
                tables[number].append((homes[number] or draw.choice([pool for pool in room if pool])).pop())
            stops = [min(BLOCK_SIZE, len(text) + size - BLOCK_SIZE * at) for at in range(len(tables[number]))]
            runs = tuple((b * BLOCK_SIZE, b * BLOCK_SIZE + n) for b, n in zip(tables[number], stops, strict=True))
            chunks.append(SequenceInput(token_ids=new, start=len(text), runs=runs, sequence_id=number + 50))
            text.extend(new)
        if chunks:
            made.append(Batch(sequences=tuple(chunks)))
    return made
