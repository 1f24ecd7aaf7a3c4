"""The engine against transformers for every family, with all that shares and reorders work: prefix cache, shared-prefix
attention, choices, prompt scores, preemption. Tokens and log-probabilities are those of one prompt computed alone.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from kernels.attention import SharedSpan
from kernels.cpu import variant as cpu
from kernels.cpu.attention import shared, tasks
from placement.planning.layout import Split
from placement.serving.events import EndReason
from tests.support.engine import BLOCK_SIZE, Gated, Listener, Parts, engines, submission
from tests.support.grammars import grammar_factory
from tests.support.oracle import greedy_each
from tests.support.ranks import ranks
from tests.support.steps import Steps
from workers.sampling.grammar import GrammarSpec
from workers.sampling.sampling import SamplingParams

NUM_TOKENS = 24
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 3, "num_attention_heads": 6, "hidden_size": 60, "head_dim": 16},
    "mistral": {"sliding_window": 45},
    "qwen2": {"num_hidden_layers": 3},
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 32, "num_key_value_heads": 1},
}
SHARED = [(37 * i + 11) % 509 for i in range(75)]
# Prompts that begin alike for many blocks, for some, and not at all; the last repeats the first.
PROMPTS = [
    SHARED,
    [*SHARED, 5, 6, 7],
    [*SHARED[:64], *(9 * i % 509 for i in range(30))],
    [*SHARED[:64], *(9 * i % 509 for i in range(24)), 1, 2, 3],
    [*SHARED[:30], 400, 401],
    [3, 1, 4, 1, 5],
    SHARED[: 8 * BLOCK_SIZE],
    SHARED,
]


@pytest.fixture(autouse=True)
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[SharedSpan]:
    """What was attended to once for several sequences. Parts are as short as the prompts here ask for."""
    found: list[SharedSpan] = []

    def choose(*args: Any, **kwargs: Any) -> tuple[SharedSpan, ...]:
        found.extend(spans := shared.choose(*args, **kwargs))
        return spans

    for module in (tasks, shared):
        monkeypatch.setattr(module, "PART", 16)
    monkeypatch.setattr(shared, "PART_TOKENS", 1)
    monkeypatch.setattr(cpu, "choose", choose)
    return found


# Families whose model is also cut over two ranks, or whose sequences are shared by ranks, and their shares.
CUT = {"llama": (2, 1), "mistral": (1, 1), "gemma": (1, 2)}
SPLIT = {"llama": (5, 2, 1), "mistral": (1, 3), "gemma": (0, 1)}


CUTS: dict[str, tuple[tuple[int, ...], Split]] = {
    **{f"{family}, cut": (shares, "tensor") for family, shares in CUT.items()},
    **{f"{family}, shared": (shares, "sequence") for family, shares in SPLIT.items()},
}


@dataclass(frozen=True)
class Case:
    runner: Steps
    oracle: PreTrainedModel
    answers: list[list[int]]


@pytest.fixture(scope="module", params=[*FAMILIES, *CUTS])
def case(request: pytest.FixtureRequest, checkpoint: Callable[..., Path], make_runner: Any) -> Iterator[Case]:
    family, _, how = request.param.partition(", ")
    path = checkpoint(family, **FAMILIES[family])
    oracle = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    answers = greedy_each(oracle, PROMPTS, NUM_TOKENS)
    if not how:
        yield Case(runner=make_runner(path), oracle=oracle, answers=answers)
    else:
        shares, split = CUTS[request.param]
        with ranks(path, shares, split=split) as cut:
            yield Case(runner=cut, oracle=oracle, answers=answers)


@pytest.fixture
def make_engine() -> Iterator[Callable[..., Parts]]:
    with engines() as make:
        yield make


def ask_all(parts: Parts, *, gated: Gated | None = None, **more: Any) -> Listener:
    """Asks for all answers; all at once where the steps of ``gated`` wait for that."""
    listener = Listener()
    for i, prompt in enumerate(PROMPTS):
        parts.engine.submit(listener, i, submission(prompt, max_tokens=NUM_TOKENS, **more))
    if gated is not None:
        gated.gate.set()
    listener.wait_ends(len(PROMPTS))
    return listener


def answers_of(listener: Listener) -> list[list[int]]:
    return [listener.tokens[i] for i in range(len(PROMPTS))]


@pytest.mark.parametrize("prefix_cache", [False, True])
@pytest.mark.parametrize("token_budget", [24, 1024])
def test_prompts_that_begin_alike_get_the_tokens_of_transformers(
    case: Case, make_engine: Any, prefix_cache: bool, token_budget: int, chosen: list[SharedSpan]
) -> None:
    parts = make_engine(case.runner, prefix_cache=prefix_cache, token_budget=token_budget)
    first, again = ask_all(parts), ask_all(parts)
    assert answers_of(first) == case.answers
    assert answers_of(again) == case.answers
    cached = [again.firsts[i].cached_tokens for i in range(len(PROMPTS))]
    if prefix_cache:
        assert chosen
        # All but what is left to compute: at least one token, and what fills no block.
        assert cached == [(len(prompt) - 1) // BLOCK_SIZE * BLOCK_SIZE for prompt in PROMPTS]
        assert parts.pool.num_cached > 0
    parts.idle()


def test_blocks_that_are_evicted_and_sequences_that_are_preempted_change_no_token(case: Case, make_engine: Any) -> None:
    runner = Gated(case.runner)
    parts = make_engine(runner, num_blocks=22)
    for _ in range(3):
        runner.gate.clear()
        assert answers_of(ask_all(parts, gated=runner)) == case.answers
    assert parts.engine.load.num_preemptions > 0
    parts.idle()


def test_choices_share_the_blocks_of_their_prompt(case: Case, make_engine: Any) -> None:
    """Also where nothing is kept for later: choices run at the same time."""
    runner = Gated(case.runner)
    parts = make_engine(runner, prefix_cache=False, token_budget=32)
    listener = Listener()
    for i in range(6):
        parts.engine.submit(listener, i, submission(SHARED, max_tokens=NUM_TOKENS, cache_salt=b"one request"))
    runner.gate.set()
    listener.wait_ends(6)
    assert [listener.tokens[i] for i in range(6)] == [case.answers[0]] * 6
    full = (len(SHARED) - 1) // BLOCK_SIZE * BLOCK_SIZE
    assert [listener.firsts[i].cached_tokens for i in range(6)] == [0, *[full] * 5]
    assert parts.pool.num_cached == 0
    parts.idle()


def test_a_draw_does_not_depend_on_who_shares_its_prompt(
    llama_checkpoint: Callable[..., Path], make_runner: Any, make_engine: Any, chosen: list[SharedSpan]
) -> None:
    runner = make_runner(llama_checkpoint(head_dim=32, num_hidden_layers=3), torch.bfloat16)

    def draw(seeds: Sequence[int]) -> list[list[int]]:
        parts, listener = make_engine(runner), Listener()
        for i, seed in enumerate(seeds):
            sampling = SamplingParams(temperature=1.0, seed=seed)
            parts.engine.submit(listener, i, submission(SHARED, max_tokens=NUM_TOKENS, sampling=sampling))
        listener.wait_ends(len(seeds))
        parts.idle()
        return [listener.tokens[i] for i in range(len(seeds))]

    together = draw(range(8))
    assert chosen
    assert [draw([seed])[0] for seed in range(3)] == together[:3]


def test_another_salt_finds_nothing(case: Case, make_engine: Any) -> None:
    parts = make_engine(case.runner)
    listener = Listener()
    for i, salt in enumerate((b"mine", b"yours", b"mine")):
        parts.engine.submit(listener, i, submission(SHARED, max_tokens=4, cache_salt=salt))
        listener.wait_ends(i + 1)
    assert [listener.firsts[i].cached_tokens for i in range(3)] == [0, 0, 72]
    parts.idle()


@pytest.mark.parametrize("token_budget", [16, 1024])
def test_prompt_scores_are_those_of_transformers(case: Case, make_engine: Any, token_budget: int) -> None:
    parts = make_engine(case.runner, token_budget=token_budget)
    ask_all(parts)  # what is cached now must not be skipped
    listener = ask_all(parts, prompt_logprobs=2)
    assert answers_of(listener) == case.answers
    for i, prompt in enumerate(PROMPTS):
        with torch.inference_mode():
            expected = case.oracle(torch.tensor([prompt])).logits[0].log_softmax(dim=-1)
        assert listener.firsts[i].cached_tokens == 0
        found = [logprob for scores in listener.scores[i] for logprob in scores.logprobs]
        wanted = [float(expected[at, token_id]) for at, token_id in enumerate(prompt[1:])]
        assert found == pytest.approx(wanted, abs=1e-4)
        assert [scores.first_index for scores in listener.scores[i]] == [
            1 + sum(len(before.logprobs) for before in listener.scores[i][:n]) for n in range(len(listener.scores[i]))
        ]
    parts.idle()


def test_a_stop_id_ends_a_sequence_whose_next_step_is_already_on_its_way(case: Case, make_engine: Any) -> None:
    parts = make_engine(case.runner)
    listener = Listener()
    stops = [answer[5 + i] for i, answer in enumerate(case.answers)]
    for i, prompt in enumerate(PROMPTS):
        parts.engine.submit(listener, i, submission(prompt, max_tokens=NUM_TOKENS, stop=[stops[i]]))
    listener.wait_ends(len(PROMPTS))
    for i, answer in enumerate(case.answers):
        assert listener.tokens[i] == answer[: answer.index(stops[i]) + 1]
        assert listener.ends[i].end is EndReason.STOP
    parts.idle()


def test_a_sampled_answer_is_the_same_alone_and_among_others(case: Case, make_engine: Any) -> None:
    def params(seed: int) -> SamplingParams:
        return SamplingParams(temperature=1.0, top_p=0.95, min_p=0.01, presence_penalty=0.5, seed=seed)

    together = make_engine(case.runner)
    listener = Listener()
    for i, prompt in enumerate(PROMPTS):
        together.engine.submit(listener, i, submission(prompt, max_tokens=NUM_TOKENS, sampling=params(i)))
    listener.wait_ends(len(PROMPTS))
    for i in (0, 3, 5):
        parts, alone = make_engine(case.runner, prefix_cache=False), Listener()
        parts.engine.submit(alone, 0, submission(PROMPTS[i], max_tokens=NUM_TOKENS, sampling=params(i)))
        alone.wait_ends(1)
        assert alone.tokens[0] == listener.tokens[i]
        parts.idle()
    together.idle()


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_an_answer_that_must_match_ends_with_its_grammar_beside_free_ones(
    served_checkpoint: Path, make_runner: Any, make_engine: Any, temperature: float
) -> None:
    """Random weights: nothing but the grammar makes it JSON. Its batch-mates get what they get alone."""
    tokenizer = Tokenizer.from_file(str(served_checkpoint / "tokenizer.json"))
    factory = grammar_factory(served_checkpoint, vocab_size=509, eos_token_ids=[2])
    schema = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "yy"]}}}
    schema |= {"required": ["a", "b"], "additionalProperties": False}
    grammar = factory.compile(GrammarSpec(kind="json_schema", source=json.dumps(schema)))
    parts = make_engine(make_runner(served_checkpoint))
    free, listener = Listener(), Listener()
    parts.engine.submit(free, 0, submission(SHARED, max_tokens=40))
    free.wait_ends(1)
    for i in range(12):
        sampling = SamplingParams(temperature=temperature, seed=i)
        wanted = {"grammar": grammar, "sampling": sampling} if i % 2 else {}
        parts.engine.submit(listener, i, submission(SHARED, max_tokens=40 if not i % 2 else 200, **wanted))
    listener.wait_ends(12)
    for i in range(12):
        if i % 2 == 0:
            assert listener.tokens[i] == free.tokens[0]
            continue
        text = tokenizer.decode(listener.tokens[i])
        if listener.ends[i].end is EndReason.STOP:
            value = json.loads(text)
            assert value.keys() == {"a", "b"} and isinstance(value["a"], int) and value["b"] in ("x", "yy")
        else:  # an integer may go on for ever
            assert len(listener.tokens[i]) == 200 and text.lstrip().startswith("{")
    assert any(listener.ends[i].end is EndReason.STOP for i in range(1, 12, 2)) or temperature == 0.0
    parts.idle()
