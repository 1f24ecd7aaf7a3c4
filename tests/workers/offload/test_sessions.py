"""The sessions of a model rank: who is asked how often, what was kept, and who may still use them."""

import time
from collections.abc import Callable

import pytest
import torch

from kernels.attention import LayerCache
from placement.model.part import Span
from placement.planning.residency import Holder, Region, Residency
from placement.serving.offload.orders import StepOrder
from placement.serving.offload.residents import session_places
from tests.support.offload.sessions import attention_worker, geometry_of
from workers.attention_worker import client
from workers.attention_worker.errors import AttentionLost
from workers.attention_worker.whereabouts import Address, Whereabouts
from workers.model.kv_cache import KVCache
from workers.offload.sessions import Opening, Sessions
from workers.offload.storing import Storing

HEADS = Span(0, 2)
GEOMETRY = geometry_of(num_blocks=4)


def residency_of(*workers: int) -> Residency:
    """Regions of four blocks, each with one worker."""
    return Residency(
        regions=tuple(
            Region(
                blocks=Span(4 * place, 4 * place + 4),
                holders=(Holder(worker=worker, kv_heads=HEADS, stripe=None),),
            )
            for place, worker in enumerate(workers)
        )
    )


def opening_of(residency: Residency, *, epoch: int = 1, resumes: bool = False) -> Opening:
    places = session_places(residency, HEADS)
    return Opening(
        epoch=epoch,
        secret=b"s" * 32,
        replica="replica-0",
        rank=0,
        residency=residency,
        places=places,
        geometries=(GEOMETRY,) * len(places),
        resumes=resumes,
    )


def told(sessions: Sessions, place: int, order: StepOrder) -> None:
    """Carries out an order without queries, and sees to it that the worker has it."""
    session = sessions.all[place]
    number = session.order(order)
    rows = torch.ones(len(order.slots), 2, 16)
    for layer in range(GEOMETRY.num_layers):
        if order.slots:
            session.send(number, layer, None, rows, rows)
    session.flush()


def names_once(sessions: Callable[[], Sessions], names: dict[int, dict[int, bytes]]) -> None:
    """Opens sessions again and again until the worker has taken all that it was sent before."""
    deadline_s = time.monotonic() + 30.0
    while True:
        found = sessions()
        held = found.held()
        found.close()
        if held == names:
            return
        assert time.monotonic() < deadline_s, held
        time.sleep(0.02)


def test_a_session_keeps_names_of_blocks_of_its_own_region_alone() -> None:
    """The other session of the same worker was told all names as well, and may have lost less."""
    with attention_worker() as (_, (host, port)):
        whereabouts = Whereabouts([Address(host=host, port=port)])
        residency, names = residency_of(0, 0), ((1, b"one"), (5, b"two"))
        first = Sessions(opening_of(residency), whereabouts)
        told(first, 0, StepOrder(names=names))
        first.close()
        epochs = iter(range(2, 1000))
        names_once(
            lambda: Sessions(opening_of(residency, epoch=next(epochs), resumes=True), whereabouts), {0: {1: b"one"}}
        )


def test_what_is_stored_for_another_replica_takes_the_names_of_its_blocks_away() -> None:
    with attention_worker() as (_, (host, port)):
        whereabouts = Whereabouts([Address(host=host, port=port)])
        residency = residency_of(0)
        sessions = Sessions(opening_of(residency), whereabouts)
        told(sessions, 0, StepOrder(names=((1, b"one"), (2, b"two"), (3, b"three"))))
        storing, scratch = storing_of(sessions, residency)
        storing.store(scratch, Span(0, 6), [(8, 14)])  # blocks 2 and 3
        sessions.close()
        epochs = iter(range(2, 1000))
        names_once(
            lambda: Sessions(opening_of(residency, epoch=next(epochs), resumes=True), whereabouts), {0: {1: b"one"}}
        )


def test_whoever_stores_while_sessions_are_opened_anew_finds_the_worker_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    with attention_worker() as (_, (host, port)):
        whereabouts = Whereabouts([Address(host=host, port=port)])
        residency = residency_of(0, 0)
        sessions = Sessions(opening_of(residency), whereabouts)
        storing, scratch = storing_of(sessions, residency)
        real, causes = client.connect, []

        def connect(*args: object, **fields: object) -> object:
            with pytest.raises(AttentionLost) as lost:
                storing.store(scratch, Span(0, 6), [(8, 14)])
            causes.append(lost.value)
            return real(*args, **fields)  # type: ignore[arg-type]

        monkeypatch.setattr("workers.offload.sessions.connect", connect)
        sessions.reopen(30.0)
        assert len(causes) == 2
        storing.store(scratch, Span(0, 6), [(8, 14)])
        sessions.close()


def test_a_worker_that_turns_sessions_away_is_not_asked_without_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    asked: list[int] = []

    class Enough(Exception):
        pass

    def connect(*args: object, **fields: object) -> object:
        asked.append(int(str(fields["epoch"])))
        if len(asked) == 3:
            raise Enough
        raise AttentionLost(0, "box", "the peer closed its connection")

    monkeypatch.setattr("workers.offload.sessions.connect", connect)
    monkeypatch.setattr("workers.offload.sessions.time.sleep", waits.append)
    with pytest.raises(Enough):
        Sessions(opening_of(residency_of(0)), Whereabouts([Address(host="127.0.0.1", port=1)]))
    assert len(waits) == 2 and min(waits) > 0
    assert asked == [asked[0], asked[0] + 1, asked[0] + 2]


def storing_of(sessions: Sessions, residency: Residency) -> tuple[Storing, KVCache]:
    layers = tuple(
        LayerCache(keys=torch.zeros(2, 4, 16), values=torch.zeros(2, 4, 16)) for _ in range(GEOMETRY.num_layers)
    )
    storing = Storing(
        sessions=lambda: sessions.all,
        places=session_places(residency, HEADS),
        residency=residency,
        block_size=4,
        cache=KVCache(layers=layers),
    )
    scratch = storing.scratch(6)
    for layer in scratch.layers:
        layer.keys.zero_()
        layer.values.zero_()
    return storing, scratch
