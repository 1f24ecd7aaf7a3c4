"""Checks that whatever a refusal for want of memory advises works when it is followed."""

from collections.abc import Sequence
from functools import partial

import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from placement.errors import HeterodyneError, InvalidConfig, NotEnoughMemory
from placement.planning.auto import choose_layouts
from placement.planning.plan import Plan
from placement.planning.planner import plan_replicas
from placement.planning.pools import Pool
from tests.support.planning import MODEL, POOLS, Case, advice, cases, follow


def plan(case: Case) -> Plan:
    return plan_replicas(MODEL, case.cluster, layouts=case.layouts, **case.arguments())


def choose(case: Case, pools: Sequence[Pool] | None = None) -> Plan:
    make_plan = partial(plan_replicas, MODEL, **case.arguments())
    num_devices = sum(len(node.devices) for node in case.cluster.nodes)
    return choose_layouts(make_plan, case.cluster, pools=None if pools is None else pools[:num_devices]).plan


@settings(max_examples=150, deadline=None)
@given(cases())
def test_advice_for_layouts_that_are_asked_for_works(case: Case) -> None:
    try:
        plan(case)
    except InvalidConfig:  # it cannot be cut so
        reject()
    except NotEnoughMemory as error:
        ways = advice(error)
        assert ways and len(ways) == len(error.remedies), error
        for way in ways:
            assert plan(follow(case, way)).replicas, (error, way)
        if case.kv_cache_bytes is None:
            assert "kv_cache" not in str(error)


@settings(max_examples=60, deadline=None)
@given(cases(), st.none() | st.lists(st.sampled_from(POOLS), min_size=6, max_size=6))
def test_advice_for_layouts_that_are_chosen_works(case: Case, pools: Sequence[Pool] | None) -> None:
    try:
        choose(case, pools)
    except NotEnoughMemory as error:
        ways = advice(error)
        assert ways and len(ways) == len(error.remedies), error
        for way in ways:
            assert choose(follow(case, way), pools).replicas, (error, way)
    except HeterodyneError:
        pytest.fail("every cluster can have a replica on each device")
