"""Whatever happens to a replica, in any order: its state holds, every answer is what it must be, and is said once."""

from collections import Counter
from collections.abc import Sequence

from hypothesis import given, note, settings
from hypothesis import strategies as st

from placement.serving.admission import Limits
from placement.serving.events import EndReason, SequenceSpec
from placement.serving.sequence import Phase
from placement.serving.settings import Checks, CoreSettings
from placement.serving.step_plan import SchedulerLimits
from tests.placement.serving.replica_world import STOP, VOCAB_SIZE, World

NUM_EVENT_SEQUENCES = 2500
CONTEXT = 64

# Prompts that begin alike for a while, so that blocks are shared.
TEXTS = ([0, 1, 2, 3] * 5, [0, 1, 2, 3] * 2 + [5] * 8, [4] * 12)
SPECS = st.builds(
    lambda text, length, rest, answer, stops, priority, salt, reuse, kind: _spec(
        [*text[:length], *rest], answer, stops, priority, salt, reuse, kind
    ),
    text=st.sampled_from(TEXTS),
    length=st.integers(0, 16),
    rest=st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=3),
    answer=st.sampled_from([1, 2, 5, 9, 12]),
    stops=st.booleans(),
    priority=st.integers(-1, 1),
    salt=st.sampled_from([b"", b"", b"", b"other"]),
    reuse=st.sampled_from([True, True, True, False]),
    kind=st.sampled_from(["here", "here", "here", "from elsewhere", "to elsewhere"]),
)


def _spec(
    prompt: list[int], answer: int, stops: bool, priority: int, salt: bytes, reuse: bool, kind: str
) -> SequenceSpec:
    return SequenceSpec(
        prompt_ids=tuple(prompt),
        max_tokens=1 if kind == "to elsewhere" else answer,
        stop_token_ids=frozenset({STOP}) if stops else frozenset(),
        priority=priority,
        cache_salt=salt,
        reuse_prefix=reuse,
        awaits_kv=kind == "from elsewhere",
        ship_to="decode-0" if kind == "to elsewhere" else None,
    )


ACTION = st.one_of(
    st.tuples(st.just("submit"), st.lists(st.tuples(SPECS, st.sampled_from([0, 0, 0, 1, 3])), min_size=1, max_size=4)),
    st.tuples(st.just("steps"), st.sampled_from([1, 2, 4, 12]), st.booleans()),
    st.tuples(st.just("steps"), st.just(1), st.just(False)),
    st.tuples(st.just("plan"), st.integers(1, 3)),
    st.tuples(st.just("end"), st.integers(1, 3), st.sampled_from([None, None, None, 0, 1])),
    st.tuples(st.just("cancel"), st.integers(1, 31)),
    st.tuples(st.just("cancel"), st.integers(1, 31)),
    st.tuples(st.just("arrive"), st.integers(0, 5), st.integers(0, 20), st.booleans()),
    st.tuples(st.just("sent"), st.integers(0, 5)),
    st.tuples(st.just("wait"), st.sampled_from([1.0, 12.0])),
    st.tuples(st.just("old transfer"), st.integers(0, 30)),
    st.tuples(st.sampled_from(["drain", "lose"]), st.integers(0, 9)),  # rare: see act
)
SETTINGS = st.builds(
    lambda num_blocks, block_size, budget, seqs, batches, cache: CoreSettings(
        limits=Limits(max_context_tokens=CONTEXT, vocab_size=VOCAB_SIZE, block_size=block_size),
        steps=SchedulerLimits(token_budget=budget, max_num_seqs=min(seqs, budget), num_batches=batches),
        num_blocks=num_blocks,
        prefix_cache=cache,
        lease_s=10.0,
        checks=Checks.ALWAYS,
    ),
    num_blocks=st.sampled_from([4, 6, 8, 20]),
    block_size=st.integers(1, 4),
    budget=st.integers(1, 16),
    seqs=st.integers(1, 6),
    batches=st.sampled_from([1, 1, 2, 3]),
    cache=st.booleans(),
)


def act(world: World, action: Sequence[object]) -> None:
    match tuple(action):
        case ("submit", list(asked)):
            for spec, emitted in asked:
                possible = min(emitted, spec.max_tokens - 1) if spec.ship_to is None else 0
                world.submit(spec, possible)
        case ("steps", int(count), bool(ahead)):
            for _ in range(count):
                world.plan()
                if ahead:
                    world.plan()
                world.end_step()
        case ("plan", int(count)):
            for _ in range(count):
                world.plan()
        case ("end", int(count), fails_at):
            for _ in range(count):
                world.end_step(fails_at=fails_at if isinstance(fails_at, int) else None)
        case ("cancel", int(number)):
            living = [key for key, text in world.texts.items() if text.ended is None and not text.refused]
            among = living if living and number % 4 else list(world.texts)  # mostly of those that have not ended
            if among:
                world.cancel(among[number % len(among)])
        case ("arrive", int(number), int(num_tokens), bool(with_token)):
            if world.incoming:
                hold_id = sorted(world.incoming)[number % len(world.incoming)]
                tokens = world.incoming[hold_id].tokens
                world.receive(hold_id, max(tokens.start, min(num_tokens, tokens.stop)), with_token=with_token)
        case ("sent", int(number)):
            if world.outgoing:
                world.sent(sorted(world.outgoing)[number % len(world.outgoing)])
        case ("wait", float(seconds)):
            world.wait(seconds)
        case ("old transfer", int(hold_id)):
            if hold_id not in world.incoming and hold_id not in world.outgoing:
                world.repeat_old_transfer(hold_id)
        case ("drain", int(chance)):
            if chance == 0:
                world.drain()
        case ("lose", int(chance)):
            if chance == 0:
                world.lose()


# Without these the sequences of events would say less than they seem to.
MUST_BE_REACHED = {
    *(f"{phase.value} was reached" for phase in Phase),
    *(f"Cancel in {phase.value}" for phase in Phase if phase is not Phase.LEAVING),  # that is a moment, and rare
    *(f"ended: {reason.value}" for reason in EndReason),
    *("Drain", "StepLost", "HoldLapsed", "KvArrived", "KvSent"),
    *("Run", "Tell", "Refused", "Receive", "Ship"),
    *("preempted", "found a prefix"),
}


def test_every_answer_is_right_and_said_once_whatever_happens() -> None:
    reached: Counter[str] = Counter()

    @settings(max_examples=NUM_EVENT_SEQUENCES, deadline=None)
    @given(
        made=SETTINGS, tokens_a_step=st.sampled_from([1, 1, 2, 3]), actions=st.lists(ACTION, min_size=6, max_size=25)
    )
    def check(made: CoreSettings, tokens_a_step: int, actions: list[tuple[object, ...]]) -> None:
        world = World(made, tokens_a_step=tokens_a_step if made.steps.num_batches > 1 else 1)
        try:
            for action in actions:
                if not world.lost:
                    act(world, action)
            world.settle()
        except BaseException:
            note(str(world.core.log))
            raise
        log = world.core.log
        assert list(log.replay()) == [entry.commands for entry in log.entries]
        reached.update(world.reached)

    check()
    assert reached.keys() >= MUST_BE_REACHED, MUST_BE_REACHED - reached.keys()
