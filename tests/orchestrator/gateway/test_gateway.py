"""The gateway over real worker processes: the public protocol, its answers and its errors."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from tokenizers import Tokenizer

from protos.heterodyne.v1 import inference_pb2 as pb
from tests.support.deploying.deployment import Deployment, settled
from tests.support.gateway.answers import PROMPT, answer, check_order, choices, details, request, text, tokens

# One deployment serves most of the tests, so they share its event loop.
pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_greedy_tokens_are_those_of_transformers(stub: Any, served_checkpoint: Path) -> None:
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(served_checkpoint, dtype=torch.float32)
    tokenizer = Tokenizer.from_file(str(served_checkpoint / "tokenizer.json"))
    ids = tokenizer.encode(PROMPT).ids
    with torch.inference_mode():
        expected = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=48,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0, len(ids) :].tolist()
    responses = await answer(stub, request(max_tokens=48))
    check_order(responses)
    assert tokens(responses) == expected
    assert text(responses) == tokenizer.decode(expected)
    finished = responses[-1].finished
    assert finished.finish_reason == pb.FINISH_REASON_LENGTH
    assert (finished.usage.prompt_tokens, finished.replica) == (len(ids), "replica-0")
    assert 0 <= finished.timings.queue_s <= finished.timings.time_to_first_token_s <= finished.timings.total_s


async def test_prompt_ids_are_used_as_they_are(stub: Any) -> None:
    ids = (await stub.Tokenize(pb.TokenizeRequest(text=PROMPT))).ids
    by_text, by_ids = await asyncio.gather(
        answer(stub, request()),
        answer(stub, pb.GenerateRequest(prompt_ids={"ids": ids}, max_tokens=8, ignore_eos=True)),
    )
    assert tokens(by_text) == tokens(by_ids)


async def test_a_seed_draws_the_same_answer_again_whatever_runs_beside_it(stub: Any) -> None:
    sampling = pb.SamplingParams(temperature=1.0, top_p=0.95, seed=42)
    alone = await answer(stub, request(sampling=sampling, max_tokens=24))
    crowd = await asyncio.gather(
        *(answer(stub, request(prompt=f"{i} waters", sampling=pb.SamplingParams(temperature=1.0))) for i in range(7)),
        answer(stub, request(sampling=sampling, max_tokens=24)),
    )
    assert tokens(crowd[-1]) == tokens(alone)
    assert alone[0].accepted.seed == 42
    unseeded = await answer(stub, request(sampling=pb.SamplingParams(temperature=1.0), max_tokens=24))
    again = pb.SamplingParams(temperature=1.0, seed=unseeded[0].accepted.seed)
    assert tokens(await answer(stub, request(sampling=again, max_tokens=24))) == tokens(unseeded)


async def test_a_stop_string_ends_the_text_and_the_computation(stub: Any, deployment: Deployment) -> None:
    whole = text(await answer(stub, request(max_tokens=40)))
    stop = whole[6:9]
    responses = await answer(stub, request(max_tokens=400, stop=["never there", stop]))
    check_order(responses)
    assert text(responses) == whole[: whole.index(stop)]
    finished = responses[-1].finished
    assert (finished.finish_reason, finished.matched_stop) == (pb.FINISH_REASON_STOP, stop)
    await settled(deployment)


async def test_a_stop_id_is_the_last_token(stub: Any) -> None:
    ids = tokens(await answer(stub, request(max_tokens=20)))
    responses = await answer(stub, request(max_tokens=20, stop_token_ids=[ids[7]]))
    assert tokens(responses) == ids[: ids.index(ids[7]) + 1]
    assert responses[-1].finished.finish_reason == pb.FINISH_REASON_STOP


async def test_logprobs_come_with_each_token_and_its_alternatives(stub: Any) -> None:
    responses = await answer(stub, request(logprobs=3))
    for token in [token for response in responses for token in response.chunk.tokens]:
        assert len(token.top) == 3
        assert token.top[0].token_id == token.id, "greedy takes the likeliest"
        assert token.logprob == token.top[0].logprob >= token.top[1].logprob >= token.top[2].logprob
        assert token.logprob <= 0


async def test_choices_are_what_requests_of_their_own_would_draw(stub: Any) -> None:
    def sampling(seed: int) -> pb.SamplingParams:
        return pb.SamplingParams(temperature=1.0, top_p=0.9, seed=seed)

    several = await answer(stub, request(num_choices=4, sampling=sampling(42), max_tokens=20))
    check_order(several)
    alone = await asyncio.gather(
        *(answer(stub, request(sampling=sampling(42 + choice), max_tokens=20)) for choice in range(4))
    )
    assert choices(several) == {choice: tokens(responses) for choice, responses in enumerate(alone)}
    greedy = choices(await answer(stub, request(num_choices=3)))
    assert greedy[0] == greedy[1] == greedy[2]


async def test_a_client_that_goes_leaves_no_choice_behind(stub: Any, deployment: Deployment) -> None:
    for _ in range(5):
        call = stub.Generate(request(num_choices=8, max_tokens=400, sampling=pb.SamplingParams(temperature=1.0)))
        await call.read()
        await call.read()
        call.cancel()
    await settled(deployment)


@pytest.mark.parametrize("max_tokens", [0, 4])
async def test_an_echo_judges_the_prompt_as_transformers_does(
    stub: Any, served_checkpoint: Path, max_tokens: int
) -> None:
    import torch
    from transformers import LlamaForCausalLM

    prompt = "In the beginning God created the heaven and the earth. " * 12
    responses = await answer(stub, request(prompt=prompt, echo=True, logprobs=2, max_tokens=max_tokens))
    check_order(responses)
    echoed = [token for response in responses for token in response.echo.tokens]
    assert "".join(response.echo.text for response in responses) == prompt
    ids = Tokenizer.from_file(str(served_checkpoint / "tokenizer.json")).encode(prompt).ids
    assert [token.id for token in echoed] == ids
    model = LlamaForCausalLM.from_pretrained(served_checkpoint, dtype=torch.float32)
    with torch.inference_mode():
        expected = torch.log_softmax(model(torch.tensor([ids])).logits[0, :-1].float(), dim=-1)
    assert not echoed[0].HasField("logprob")
    for token, row in zip(echoed[1:], expected, strict=True):
        assert token.logprob == pytest.approx(float(row[token.id]), abs=1e-4)
        best, _ = row.topk(2)
        assert [item.logprob for item in token.top] == pytest.approx(best.tolist(), abs=1e-4)
    assert len(tokens(responses)) == max_tokens


async def test_an_echo_without_logprobs_is_the_prompt(stub: Any) -> None:
    responses = await answer(stub, request(echo=True, num_choices=2))
    check_order(responses)
    assert "".join(response.echo.text for response in responses) == PROMPT


async def test_no_stop_id_is_drawn_before_min_tokens(stub: Any) -> None:
    (first, *_) = tokens(await answer(stub, request()))
    (ended,) = [tokens(await answer(stub, request(stop_token_ids=[first])))]
    assert ended == [first]
    ids = tokens(await answer(stub, request(stop_token_ids=[first], min_tokens=5)))
    assert len(ids) >= 5 and first not in ids[:5]


async def test_a_bias_decides_and_a_penalty_dissuades(stub: Any) -> None:
    bias = [pb.LogitBias(token_id=77, bias=100.0)]
    assert tokens(await answer(stub, request(sampling=pb.SamplingParams(logit_bias=bias)))) == [77] * 8
    penalized = pb.SamplingParams(logit_bias=[pb.LogitBias(token_id=77, bias=100.0)], repetition_penalty=100.0)
    ids = tokens(await answer(stub, request(sampling=penalized)))
    assert ids[0] == 77 and set(ids[1:]) != {77}


async def test_a_prompt_seen_before_is_cached_for_those_of_its_salt(stub: Any) -> None:
    async def cached(salt: str) -> int:
        message = request(prompt="And the spirit moved upon the waters: so be it. " * 10, cache_salt=salt)
        return int((await answer(stub, message))[-1].finished.usage.cached_prompt_tokens)

    assert await cached("one") == 0
    assert await cached("one") > 0
    assert await cached("two") == 0


async def test_an_answer_matches_what_was_asked(stub: Any) -> None:
    output = pb.StructuredOutput(regex="(yes|no)[.]{3}")
    sampling = pb.SamplingParams(temperature=1.0)
    message = pb.GenerateRequest(prompt=PROMPT, structured_output=output, sampling=sampling, num_choices=4)
    responses = await answer(stub, message)
    check_order(responses)
    texts = {
        choice: "".join(r.chunk.text for r in responses if r.HasField("chunk") and r.chunk.choice == choice)
        for choice in range(4)
    }
    assert set(texts.values()) <= {"yes...", "no..."}
    assert responses[-1].finished.finish_reason == pb.FINISH_REASON_STOP


async def test_models_are_listed_with_their_limits(stub: Any, served_checkpoint: Path) -> None:
    (model,) = (await stub.ListModels(pb.ListModelsRequest())).models
    assert model == (await stub.GetModel(pb.GetModelRequest(name=served_checkpoint.name))).model
    assert (model.name, model.architecture, model.vocab_size) == (served_checkpoint.name, "llama", 509)
    assert (model.max_context_tokens, model.dtype, list(model.eos_token_ids)) == (512, "float32", [2])


async def test_detokenize_undoes_tokenize(stub: Any) -> None:
    ids = (await stub.Tokenize(pb.TokenizeRequest(text="so be it: ça va, 水"))).ids
    assert (await stub.Detokenize(pb.DetokenizeRequest(ids=ids))).text == "so be it: ça va, 水"


BAD = [
    ({"max_tokens": 0}, "max_tokens", "out of range"),
    ({"max_tokens": -1}, "max_tokens", "out of range"),
    ({"max_tokens": 2**31 - 1}, "max_tokens", "out of range"),
    ({"prompt": ""}, "prompt", "no token"),
    ({"prompt": "waters " * 600}, "prompt", "no room"),
    ({"prompt": "w" * 3_000_000}, "prompt", "longer than the context"),
    ({"sampling": {"temperature": -0.5}}, "sampling.temperature", "out of range"),
    ({"sampling": {"temperature": float("nan")}}, "sampling.temperature", "out of range"),
    ({"sampling": {"top_p": 0.0}}, "sampling.top_p", "out of range"),
    ({"sampling": {"top_k": -1}}, "sampling.top_k", "out of range"),
    ({"sampling": {"min_p": 1.5}}, "sampling.min_p", "out of range"),
    ({"sampling": {"repetition_penalty": 0.0}}, "sampling.repetition_penalty", "out of range"),
    ({"sampling": {"logit_bias": [{"token_id": 509}]}}, "sampling.logit_bias[0].token_id", "out of range"),
    ({"num_choices": 2**31 - 1}, "num_choices", "out of range"),
    ({"min_tokens": 2**31 - 1}, "min_tokens", "out of range"),
    ({"cache_salt": "x" * 200}, "cache_salt", "too long"),
    ({"logprobs": 2**31 - 1}, "logprobs", "out of range"),
    ({"priority": 1000}, "priority", "out of range"),
    ({"stop": ["x"] * 17}, "stop", "too many"),
    ({"stop": [""]}, "stop[0]", "length"),
    ({"stop_token_ids": [509]}, "stop_token_ids[0]", "out of range"),
    ({"request_id": "x" * 200}, "request_id", "too long"),
]


@pytest.mark.parametrize(("fields", "name", "problem"), BAD)
async def test_a_bad_field_is_named_with_its_problem_and_its_fix(
    stub: Any, fields: dict[str, Any], name: str, problem: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await answer(stub, request(**fields))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    (violation,) = details(caught.value, error_details_pb2.BadRequest).field_violations
    assert violation.field == name
    assert problem in violation.description
    assert violation.description.rstrip(".").count(".") >= 1, "a problem and a fix"


async def test_an_id_outside_the_vocabulary_is_refused(stub: Any) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await answer(stub, pb.GenerateRequest(prompt_ids={"ids": [1, 509]}))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "prompt_ids.ids[1]" in caught.value.details()


async def test_an_unknown_model_is_not_found_on_every_call(stub: Any) -> None:
    calls = [
        answer(stub, request(model="gpt-5")),
        stub.Tokenize(pb.TokenizeRequest(model="gpt-5")),
        stub.Detokenize(pb.DetokenizeRequest(model="gpt-5")),
        stub.GetModel(pb.GetModelRequest(name="gpt-5")),
    ]
    for call in calls:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
