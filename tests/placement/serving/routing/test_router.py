from dataclasses import replace

from placement.planning.limits import ReplicaLimits
from placement.serving.routing.choice import ReplicaLoad
from placement.serving.routing.prefixes import SentPrefixes
from placement.serving.routing.router import Prompt, Router
from placement.serving.step_plan import StepLoad

LIMITS = ReplicaLimits(block_size=4, token_budget=64, max_num_seqs=8)
A = ReplicaLoad(
    name="a", accepting=True, pending_tokens=0, num_running=0, num_waiting=0, free_blocks=50, total_blocks=50
)
B = replace(A, name="b")
TEXT = Prompt(token_ids=tuple(range(20)))


def route(router: Router, a: ReplicaLoad, b: ReplicaLoad, prompt: Prompt = TEXT) -> str:
    found = router.route([a, b], prompt)
    assert found is not None
    return found.replica


def test_prompt_goes_where_its_beginning_was_sent_before() -> None:
    router = Router(LIMITS)
    assert route(router, replace(A, pending_tokens=1), B) == "b"
    # 16 of 20 tokens are at b, so that it may have 15 tokens more to do.
    assert route(router, A, replace(B, pending_tokens=15)) == "b"
    longer = Prompt(token_ids=(*range(18), *range(100, 120)))
    assert route(router, A, replace(B, pending_tokens=15), longer) == "b", "as many begin alike"
    assert route(router, A, replace(B, pending_tokens=17), Prompt(token_ids=(9, *range(19)))) == "a", "none begin alike"


def test_prefix_is_of_one_salt_and_for_prompts_that_reuse_it() -> None:
    for other in (replace(TEXT, cache_salt=b"other"), replace(TEXT, reuses_prefix=False)):
        router = Router(LIMITS)
        assert route(router, replace(A, pending_tokens=1), B) == "b"
        assert route(router, A, replace(B, pending_tokens=1), other) == "a"
    router = Router(replace(LIMITS, prefix_cache=False))
    assert route(router, replace(A, pending_tokens=1), B) == "b"
    assert route(router, A, replace(B, pending_tokens=1)) == "a", "replicas keep none"


def test_replica_that_starts_anew_has_no_prefix_but_is_taken_to_be_as_fast() -> None:
    router = Router(LIMITS)
    assert route(router, replace(A, pending_tokens=1), B) == "b"
    router.stepped("b", StepLoad(num_prefill_tokens=20), 0.1)
    known = router.speed("b")
    router.restarted("b")
    assert route(router, A, replace(B, pending_tokens=1)) == "a"
    assert router.speed("b") == known


def test_steps_and_answers_are_learnt_by_replica() -> None:
    router = Router(LIMITS)
    router.stepped("a", StepLoad(num_prefill_tokens=20), 2.0)
    router.stepped("b", StepLoad(num_prefill_tokens=20), 0.2)
    router.stepped("b", StepLoad(num_decodes=2), 0.1, [7, 7])
    assert route(router, A, replace(B, pending_tokens=40)) == "b"
    assert router.speed("a").answer_tokens is None and router.speed("b").answer_tokens == 7
    assert not router.speed("c").is_known


def test_nothing_is_routed_where_nothing_accepts() -> None:
    assert Router(LIMITS).route([replace(A, accepting=False)], TEXT) is None


def test_sent_prefixes_forget_the_ends_of_what_was_used_least_recently() -> None:
    sent = SentPrefixes()
    first, second = [b"a", b"b", b"c"], [b"a", b"d"]
    sent.note(first, most=4)
    sent.note(second, most=4)
    assert len(sent) == 4 and sent.num_found(first) == 3 and sent.num_found(second) == 2
    assert sent.num_found([b"b"]) == 1 and sent.num_found([b"x", b"a"]) == 0
    sent.note([b"e"], most=4)
    assert sent.num_found(first) == 2 and sent.num_found(second) == 2 and sent.num_found([b"e"]) == 1
