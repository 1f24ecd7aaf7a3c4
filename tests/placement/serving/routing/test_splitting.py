"""Pairs of replicas against one alone: by time, by role, and by what the configuration says."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.planning.limits import ReplicaLimits
from placement.planning.plan import Role
from placement.serving.routing.choice import ReplicaLoad, Route, RouteKind, candidates, shortest_queue
from placement.serving.routing.links import LinkSpeed
from placement.serving.routing.router import Disaggregation, Prompt, Router
from placement.serving.routing.splitting import Costs, split_option
from placement.serving.step_plan import StepLoad

LIMITS = ReplicaLimits(block_size=16, token_budget=256, max_num_seqs=32)
LOAD = ReplicaLoad(
    name="a", accepting=True, pending_tokens=0, num_running=0, num_waiting=0, free_blocks=500, total_blocks=500
)
P, D, M = (replace(LOAD, name=role.value, role=role) for role in (Role.PREFILL, Role.DECODE, Role.MIXED))
LONG = Prompt(token_ids=range(1000), max_tokens=100)
SHORT = Prompt(token_ids=range(4), max_tokens=100)
MODES: tuple[Disaggregation, ...] = ("auto", "never", "always")


def router(mode: Disaggregation = "auto", **slowness: float) -> Router:
    """One that has measured replicas: 1000 tokens of prompts in a second, 20 ms a step of answers, or so much more."""
    made = Router(LIMITS, mode=mode, kv_bytes_per_token=1000)
    for name, times in slowness.items():
        for num_tokens in (64, 128, 256):
            made.stepped(name, StepLoad(num_prefill_tokens=num_tokens), times * num_tokens / 1000)
        for num_decodes in (1, 8, 16):
            made.stepped(name, StepLoad(num_decodes=num_decodes), times * 0.02)
    return made


def chosen(made: Router, *loads: ReplicaLoad, prompt: Prompt = LONG) -> Route:
    route = made.route(loads, prompt)
    assert route is not None and route.reason
    return route


def busy(load: ReplicaLoad, num_running: int) -> ReplicaLoad:
    return replace(load, num_running=num_running, pending_tokens=num_running)


def test_the_prompt_goes_to_its_pool_and_the_answer_to_the_other_and_the_reason_names_both() -> None:
    made = router(prefill=1.0, decode=1.0)
    route = chosen(made, P, busy(D, 8))
    assert (route.prefill, route.replica, route.kind) == ("prefill", "decode", RouteKind.SPLIT)
    assert route.reason.startswith("prefill computes the prompt and decode the answer, as the first token is expected")
    assert "decode has 8 sequences running" in route.reason and "0.999 MB" in route.reason
    assert "prefill alone would take 1 s" in route.reason


def test_a_prompt_of_a_few_tokens_is_not_worth_a_transfer() -> None:
    made = router(prefill=1.0, decode=1.0)
    made.transferred("prefill", "decode", num_tokens=3, num_bytes=3000, exposed_s=0.2)
    route = chosen(made, P, D, prompt=SHORT)
    assert route.prefill is None


def test_one_token_and_what_is_scored_are_never_split() -> None:
    for prompt in (Prompt(token_ids=[1]), Prompt(token_ids=range(500), reuses_prefix=False)):
        for mode in MODES:
            route = chosen(router(mode, prefill=1.0, decode=1.0), P, D, prompt=prompt)
            assert route.prefill is None
            assert mode == "never" or route.replica == "decode", "answers are computed there"


def test_always_splits_whatever_it_costs_if_only_there_are_two() -> None:
    made = router("always", prefill=50.0, decode=1.0, a=1.0, b=1.0)
    assert chosen(made, P, D, prompt=SHORT).prefill == "prefill"
    route = chosen(made, replace(LOAD, name="a"), replace(LOAD, name="b"))
    assert route.prefill is not None and route.prefill != route.replica
    assert chosen(made, P).prefill is None


def test_mixed_replicas_share_a_request_only_for_a_clear_gain() -> None:
    made = router(a=1.0, b=1.0)
    a, b = replace(LOAD, name="a"), replace(LOAD, name="b")
    assert chosen(made, a, b).prefill is None, "idle and equal"
    assert chosen(router(), a, b).prefill is None, "nothing is known"
    # One computes prompts 20 times as fast, and has no place for an answer.
    quick = Router(LIMITS, kv_bytes_per_token=1000)
    for name, token_s in (("a", 0.0001), ("b", 0.002)):
        for num_tokens in (64, 256):
            quick.stepped(name, StepLoad(num_prefill_tokens=num_tokens), token_s * num_tokens)
        quick.stepped(name, StepLoad(num_decodes=1), 0.5 if name == "a" else 0.02)
        quick.stepped(name, StepLoad(num_decodes=8), 0.5 if name == "a" else 0.02)
    route = chosen(quick, a, b)
    assert (route.prefill, route.replica) == ("a", "b")
    no_size = Router(LIMITS)
    no_size._speeds = quick._speeds
    assert chosen(no_size, a, b).prefill is None, "what a transfer costs is not known"


def test_a_prompt_is_asked_for_once_there_is_room_for_it_while_what_is_before_it_is_computed() -> None:
    made = router(prefill=1.0, decode=1.0)
    for name in ("prefill", "decode"):
        made.stepped(name, StepLoad(num_decodes=1), 0.02, [100])

    def first_s(load: ReplicaLoad, answers: ReplicaLoad) -> float:
        p, d = (
            next(iter(candidates([it], 1000, limits=LIMITS, speeds={it.name: made.speed(it.name)}, cached_tokens={})))
            for it in (load, answers)
        )
        costs = Costs(prompt_tokens=1000, limits=LIMITS, kv_bytes_per_token=1000, answer_tokens=100, links={})
        return split_option(p, d, costs).first_s

    queued, roomy = replace(P, num_waiting=1, pending_tokens=1500), busy(D, 8)
    full = replace(roomy, free_blocks=0)
    idle_s = first_s(P, roomy)
    queue_s, room_s = first_s(queued, roomy) - idle_s, first_s(P, full) - idle_s
    assert queue_s == pytest.approx(1.5, rel=0.05)
    assert room_s == pytest.approx(made.speed("decode").place_s(1, num_running=8)), "then comes the whole prompt"
    assert first_s(queued, full) == pytest.approx(idle_s + max(queue_s, room_s)), "both are waited for at once"


def test_running_answers_keep_a_long_prompt_away() -> None:
    # Alone on the decode replica the first token would come as soon, but 30 answers would wait for it.
    made = router(prefill=1.0, decode=0.5)
    assert chosen(made, P, busy(D, 30)).prefill == "prefill"


def test_a_queue_at_the_prefill_replica_sends_prompts_elsewhere() -> None:
    made = router(prefill=1.0, decode=1.0, mixed=1.0)
    assert chosen(made, P, D, M).prefill == "prefill"
    other = Prompt(token_ids=range(5000, 6000), max_tokens=100)
    spilled = chosen(made, replace(P, pending_tokens=2500), busy(D, 8), M, prompt=other)
    assert "mixed" in (spilled.prefill, spilled.replica) and spilled.kind is RouteKind.SPILLED
    full_p, full_m = replace(P, pending_tokens=9000), replace(M, pending_tokens=8000)
    pulled = chosen(made, full_p, D, full_m, prompt=Prompt(token_ids=range(7000, 8000)))
    assert (pulled.replica, pulled.prefill, pulled.kind) == ("decode", None, RouteKind.PULLED)
    assert made.pools.pulled == {"decode"}
    chosen(made, P, D, M)
    assert not made.pools.pulled


def test_prefixes_are_found_by_the_block_size_of_each_replica() -> None:
    made = router("always", prefill=1.0, decode=1.0, other=1.0)
    loads = (replace(P, block_size=64), replace(P, name="other", block_size=16), D)
    first = chosen(made, *loads)
    assert first.new_tokens == 999
    second = chosen(made, *loads)
    assert second.prefill == first.prefill, "it has most of the prompt"
    assert second.new_tokens == 999 - 1000 // (64 if first.prefill == "prefill" else 16) * (
        64 if first.prefill == "prefill" else 16
    )


def test_what_the_decode_replica_has_is_neither_computed_nor_sent() -> None:
    made = router(prefill=1.0, decode=1.0)
    assert chosen(made, P, D).prefill == "prefill"
    again = chosen(made, replace(P, pending_tokens=500), D)
    assert (again.replica, again.prefill) == ("decode", None), "all but 8 tokens are there"


def test_a_pair_whose_transfers_fail_is_avoided_and_tried_again() -> None:
    made = router(prefill=1.0, decode=0.9)
    made.stepped("decode", StepLoad(num_decodes=8), 0.02)
    loads = (P, busy(D, 2))
    assert chosen(made, *loads).prefill == "prefill"
    for _ in range(5):
        made.transfer_failed("prefill", "decode")
    prompts = (Prompt(token_ids=range(at, at + 1000), max_tokens=100) for at in range(1000, 10**6, 1000))
    routes = [chosen(made, *loads, prompt=next(prompts)) for _ in range(300)]
    assert routes[0].prefill is None and any(route.prefill for route in routes)


def test_links_learn_seconds_by_bytes_and_begin_with_a_prior() -> None:
    link = LinkSpeed()
    assert link.exposed_s(10**9) == pytest.approx(1.0, rel=0.1)
    for num_bytes in (10**6, 10**7, 10**8) * 40:
        link = link.after(num_bytes, 0.01 + num_bytes / 1e8)
    assert link.exposed_s(5 * 10**7) == pytest.approx(0.51, rel=0.05)
    failed = link.after_failure()
    assert failed.failed_share == 0.5 and failed.passed_over().failed_share < 0.5
    assert failed.after(10**6, 0.02).failed_share == 0.25


LOADS = st.lists(
    st.builds(
        ReplicaLoad,
        name=st.sampled_from("abcd"),
        accepting=st.booleans(),
        pending_tokens=st.integers(0, 5000),
        num_running=st.integers(0, 32),
        num_waiting=st.integers(0, 8),
        free_blocks=st.integers(0, 500),
        total_blocks=st.just(500),
        role=st.sampled_from(Role),
        block_size=st.sampled_from((0, 8, 16)),
    ),
    unique_by=lambda load: load.name,
)
SLOWNESS = st.dictionaries(st.sampled_from("abcd"), st.floats(0.1, 10.0))


@given(LOADS, SLOWNESS, st.integers(1, 3000))
def test_never_is_the_shortest_queue_whatever_the_roles_are(
    loads: list[ReplicaLoad], slowness: dict[str, float], num_tokens: int
) -> None:
    made = router("never", **slowness)
    speeds = {name: made.speed(name) for name in slowness}
    old = shortest_queue(loads, num_tokens, limits=LIMITS, speeds=speeds, cached_tokens={})
    assert made.choose(loads, Prompt(token_ids=range(num_tokens))) == old


@given(LOADS, SLOWNESS, st.integers(1, 3000), st.sampled_from(MODES))
def test_every_route_is_of_replicas_that_accept_and_there_is_one_if_any_does(
    loads: list[ReplicaLoad], slowness: dict[str, float], num_tokens: int, mode: Disaggregation
) -> None:
    made = router(mode, **slowness)
    accepting = {load.name for load in loads if load.accepting}
    route = made.route(loads, Prompt(token_ids=range(num_tokens)))
    assert (route is None) == (not accepting)
    if route is not None:
        assert route.replica in accepting and route.prefill in {None, *accepting} - {route.replica}
        assert 0 <= route.new_tokens <= num_tokens
        if mode == "always" and num_tokens > 1 and len(accepting) > 1:
            assert route.prefill is not None


@given(LOADS, SLOWNESS, st.integers(2, 3000))
def test_mixed_replicas_alone_are_chosen_as_ever_where_no_pair_is_clearly_faster(
    loads: list[ReplicaLoad], slowness: dict[str, float], num_tokens: int
) -> None:
    loads = [replace(load, role=Role.MIXED) for load in loads]
    route = router("auto", **slowness).choose(loads, Prompt(token_ids=range(num_tokens)))
    if route is not None and route.prefill is None:
        assert route == router("never", **slowness).choose(loads, Prompt(token_ids=range(num_tokens)))
