"""Keys and values that go to other replicas: what a step tells of how far it is, to whom, and when."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.attention import Run
from kernels.select import kernels_for
from placement.model.part import Part, Span
from placement.model.weights import shard_tensors
from placement.serving.kv.peers import Shipment
from tests.support.oracle import WIDE
from tests.support.ranks import read_model
from workers.host.device import open_device
from workers.model.kv_cache import allocate_kv_cache
from workers.model.progress import LayerProgress
from workers.startup.checkpoint import load_weights
from workers.step.runner import ModelRunner
from workers.step.types import Batch, SequenceInput

PROMPT = list(range(3, 43))
HOST = torch.device("cpu")


class Shipper:
    """Notes what it is told, and what was written whenever a layer was."""

    def __init__(self) -> None:
        self.shipped: dict[bytes, tuple[Shipment, Sequence[Run], LayerProgress]] = {}
        self.closed: list[bytes] = []

    def ship(self, shipment: Shipment, runs: Sequence[Run], progress: LayerProgress) -> None:
        self.shipped[shipment.transfer_id] = (shipment, runs, progress)

    def close(self, transfer_id: bytes) -> None:
        self.closed.append(transfer_id)


def runner(path: Path, shipper: Shipper, dtype: torch.dtype) -> ModelRunner:
    model, device = read_model(path), open_device("cpu", 1)
    weights = load_weights(path, shard_tensors(model, Part.whole(model)), dtype, HOST, lambda *_: None)
    return ModelRunner(
        model=model,
        weights=weights,
        cache=allocate_kv_cache(model, num_slots=128, dtype=dtype, device=device),
        device=HOST,
        kernels=kernels_for(HOST),
        shipper=shipper,
    )


def batch(*ships: Shipment | None) -> Batch:
    sequences = tuple(
        SequenceInput(token_ids=PROMPT, start=0, runs=((40 * place, 40 * (place + 1)),), ship=ship)
        for place, ship in enumerate(ships)
    )
    return Batch(sequences=sequences)


BY_LAYER = Shipment(transfer_id=bytes(16), tokens=Span(0, 40))
AT_END = Shipment(transfer_id=bytes([1] * 16), tokens=Span(8, 40), by_layer=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.every_target
def test_layers_are_told_one_by_one_where_that_is_wanted_and_else_at_the_end(
    llama_checkpoint: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    told: list[tuple[int, bool, bool]] = []
    advance = LayerProgress.advance

    def note(self: LayerProgress, num_layers: int) -> None:
        advance(self, num_layers)
        at_end = shipper.shipped[AT_END.transfer_id][2]
        told.append((num_layers, self.is_written(num_layers - 1), at_end.is_written(0)))

    monkeypatch.setattr(LayerProgress, "advance", note)
    shipper = Shipper()
    run = runner(llama_checkpoint(num_hidden_layers=3, **WIDE), shipper, dtype)
    run.prepare(batch(BY_LAYER, None, AT_END))()
    assert told == [(1, True, False), (2, True, False), (3, True, False)]
    assert shipper.shipped[BY_LAYER.transfer_id][1] == ((0, 40),)
    assert shipper.shipped[AT_END.transfer_id][1] == ((80, 120),)
    assert all(progress.is_written(2) for _, _, progress in shipper.shipped.values())


def test_a_step_that_fails_says_so_to_all_who_wait_for_its_layers(
    llama_checkpoint: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    shipper = Shipper()
    run = runner(llama_checkpoint(), shipper, torch.float32)

    def fail(*_: object) -> None:
        raise RuntimeError("on fire")

    monkeypatch.setattr(ModelRunner, "_hidden", fail)
    with pytest.raises(RuntimeError, match="on fire"):
        run.prepare(batch(BY_LAYER, AT_END))()
    assert all(progress.has_failed for _, _, progress in shipper.shipped.values())


def test_transfers_that_are_over_are_closed_when_the_step_is_laid_out(llama_checkpoint: Callable[..., Any]) -> None:
    shipper = Shipper()
    run = runner(llama_checkpoint(), shipper, torch.float32)
    run.prepare(replace(batch(None), closed=(b"a", b"b")))
    assert shipper.closed == [b"a", b"b"]
