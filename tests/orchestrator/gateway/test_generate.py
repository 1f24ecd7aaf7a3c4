"""Generate at the seam of the leader stream: what a replica is told, and what clients see of what it says."""

import asyncio
from typing import Any

import grpc
import pytest
from google.rpc import code_pb2

from protos.heterodyne.v1 import inference_pb2 as pb
from protos.heterodyne.worker.v1 import worker_pb2
from tests.support.clocks import PATIENCE_S, until
from tests.support.gateway.generating import LENGTH, STOP, ask, collect, serving, submitted, texts, token, told
from tests.support.gateway.stub_gateway import BOS, EOS, EPOCH

CHATML = (
    "{% for message in messages %}{{ message.role }} {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


async def test_a_plain_request_is_submitted_with_every_field_that_changes_nothing() -> None:
    async with serving() as (gateway, stub):
        answer = ask(stub, max_tokens=4)
        submit = await told(gateway.worker)
        (fork,) = submit.forks
        assert list(submit.prompt_ids) == [0, 1, 2]
        sampling = submit.sampling
        assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (0.0, 0, 1.0, 0.0)
        assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (1.0, 0.0, 0.0)
        assert not sampling.bias_ids and not sampling.biases
        assert (submit.max_tokens, submit.min_tokens, list(submit.stop_token_ids)) == (4, 0, [EOS])
        assert not submit.HasField("logprobs") and not fork.HasField("prompt_logprobs")
        assert submit.cache_salt == b"" and not submit.HasField("grammar")
        gateway.worker.step(token(fork, 0, 3, end=LENGTH, cached_tokens=2))
        responses, code = await answer
        assert code is grpc.StatusCode.OK
        assert [response.WhichOneof("event") for response in responses] == ["accepted", "chunk", "finished"]
        assert responses[1].chunk.end.finish_reason == pb.FINISH_REASON_LENGTH
        assert responses[-1].finished.usage.cached_prompt_tokens == 2


async def test_everything_that_was_asked_reaches_the_replica() -> None:
    async with serving() as (gateway, stub):
        answer = ask(
            stub,
            sampling={
                "temperature": 0.5,
                "min_p": 0.25,
                "repetition_penalty": 1.5,
                "presence_penalty": -0.5,
                "frequency_penalty": 0.5,
                "logit_bias": [{"token_id": 4, "bias": -2.0}, {"token_id": 1, "bias": 3.0}],
                "seed": 5,
            },
            max_tokens=9,
            min_tokens=3,
            logprobs=2,
            priority=7,
            cache_salt="tenant",
        )
        submit = await told(gateway.worker)
        (fork,) = submit.forks
        assert fork.seed == 5
        assert submit.sampling == worker_pb2.Sampling(
            temperature=0.5,
            top_p=1.0,
            min_p=0.25,
            repetition_penalty=1.5,
            presence_penalty=-0.5,
            frequency_penalty=0.5,
            bias_ids=[4, 1],
            biases=[-2.0, 3.0],
        )
        assert (submit.max_tokens, submit.min_tokens, submit.logprobs, submit.priority) == (9, 3, 2, 7)
        assert len(submit.cache_salt) == 32
        assert not fork.HasField("prompt_logprobs"), "without echo nobody sees them"
        gateway.worker.step(token(fork, 0, 3, end=STOP))
        await answer


async def test_choices_are_sequences_of_their_own_with_seeds_in_a_row_and_end_together() -> None:
    async with serving() as (gateway, stub):
        answer = ask(stub, num_choices=3, sampling={"temperature": 1.0, "seed": 2**64 - 1}, cache_salt="t", stop=["xy"])
        submit = await told(gateway.worker)
        assert gateway.worker.submits.empty(), "one message for all of them"
        assert [fork.seed for fork in submit.forks] == [2**64 - 1, 0, 1]
        assert len({fork.sequence_id for fork in submit.forks}) == 3
        assert list(submit.prompt_ids) == [0, 1, 2] and len(submit.cache_salt) == 32
        assert gateway.admission.in_flight == 3, "a slot for each choice"
        entries = gateway.generator.journal.on_replica("replica-0", EPOCH)
        assert all(entry.prompt_ids is entries[0].prompt_ids for entry in entries), "the prompt is held once"
        assert len(gateway.generator.journal) == 3
        one, two, three = submit.forks
        gateway.worker.step(token(one, 0, 3), token(two, 0, 23), token(three, 0, 5, end=STOP))
        gateway.worker.step(token(one, 1, 4), token(two, 1, 24))
        assert await asyncio.wait_for(gateway.worker.cancels.get(), PATIENCE_S) == two.sequence_id, "at once"
        assert not answer.done()
        assert all(entry.sampling == submit.sampling for entry in entries), "the state of sampling does not change"
        gateway.worker.step(token(one, 2, 5, end=LENGTH))
        responses, code = await answer
        assert code is grpc.StatusCode.OK
        assert responses[0].accepted.seed == 2**64 - 1
        assert texts(responses) == {0: "def", 1: "", 2: "f"}
        ends = {response.chunk.choice: response.chunk.end for response in responses if response.chunk.HasField("end")}
        assert {choice: end.completion_tokens for choice, end in ends.items()} == {0: 3, 1: 2, 2: 1}
        finished = responses[-1].finished
        assert finished.finish_reason == pb.FINISH_REASON_LENGTH
        assert finished.usage.completion_tokens == 6
        assert gateway.worker.cancels.empty()


async def test_the_prompt_travels_once_however_many_choices_there_are() -> None:
    async with serving(context=2**13) as (gateway, stub):
        sizes: dict[int, int] = {}
        for num_choices in (1, 8):
            seed = {"temperature": 1.0, "seed": 2**63 + 1}  # as long as a seed can be
            answer = ask(stub, prompt="a" * 4096, num_choices=num_choices, sampling=seed)
            forks = await submitted(gateway.worker, num_choices)
            gateway.worker.step(*(token(fork, 0, 3, end=STOP) for fork in forks))
            assert (await answer)[1] is grpc.StatusCode.OK
            sizes[num_choices] = gateway.worker.submitted_bytes - sum(sizes.values())
        assert sizes[1] > 4096
        assert sizes[8] < 1.1 * sizes[1]


async def test_one_choice_refused_fails_the_request_once_and_cancels_the_others() -> None:
    async with serving() as (gateway, stub):
        answer = ask(stub, num_choices=3)
        one, two, three = await submitted(gateway.worker, 3)
        gateway.worker.step(token(one, 0, 3), token(three, 0, 3, end=STOP))
        gateway.worker.reject(two.sequence_id, code_pb2.RESOURCE_EXHAUSTED, "no blocks")
        responses, code = await answer
        assert code is grpc.StatusCode.UNAVAILABLE
        assert [response.WhichOneof("event") for response in responses].count("finished") == 1
        assert responses[-1].finished.error.code == code_pb2.UNAVAILABLE
        assert await asyncio.wait_for(gateway.worker.cancels.get(), PATIENCE_S) == one.sequence_id
        assert gateway.worker.cancels.empty(), "what has ended or was not taken is not cancelled"


async def test_a_client_that_goes_cancels_every_choice() -> None:
    async with serving() as (gateway, stub):
        call = stub.Generate(pb.GenerateRequest(prompt="abc", num_choices=4))
        forks = await submitted(gateway.worker, 4)
        await call.read()
        call.cancel()
        cancelled = [await asyncio.wait_for(gateway.worker.cancels.get(), PATIENCE_S) for _ in forks]
        assert sorted(cancelled) == [fork.sequence_id for fork in forks]


async def test_an_echo_without_logprobs_waits_for_nobody() -> None:
    async with serving() as (gateway, stub):
        responses = aiter(stub.Generate(pb.GenerateRequest(prompt="abc", echo=True)))
        assert (await anext(responses)).HasField("accepted")
        echo = (await asyncio.wait_for(anext(responses), PATIENCE_S)).echo
        assert ([item.id for item in echo.tokens], echo.text) == ([0, 1, 2], "abc")
        (fork,) = await submitted(gateway.worker)
        assert not fork.HasField("prompt_logprobs")
        gateway.worker.step(token(fork, 0, 3, end=STOP))
        assert texts([response async for response in responses]) == {0: "d"}


async def test_a_judged_echo_precedes_every_chunk_and_only_the_first_choice_is_asked_for_it() -> None:
    async with serving() as (gateway, stub):
        answer = ask(stub, num_choices=2, echo=True, logprobs=1)
        one, two = await submitted(gateway.worker, 2)
        assert one.prompt_logprobs == 1 and not two.HasField("prompt_logprobs")
        gateway.worker.step(token(two, 0, 7, logprob=-1.0, end=STOP))
        for first in (1, 2):
            run = worker_pb2.PromptLogprobs(first_index=first, logprobs=[-first], top_ids=[9], top_logprobs=[-0.5])
            gateway.worker.step(worker_pb2.SequenceOutput(sequence_id=one.sequence_id, prompt=run))
        gateway.worker.step(token(one, 0, 8, logprob=-2.0, end=STOP))
        responses, code = await answer
        assert code is grpc.StatusCode.OK
        kinds = [response.WhichOneof("event") for response in responses]
        assert kinds.index("chunk") > max(index for index, kind in enumerate(kinds) if kind == "echo")
        shown = [item for response in responses for item in response.echo.tokens]
        assert [item.id for item in shown] == [0, 1, 2]
        assert not shown[0].HasField("logprob") and [item.logprob for item in shown[1:]] == [-1.0, -2.0]
        assert texts(responses) == {0: "i", 1: "h"}


async def test_nothing_but_the_prompt_may_be_asked_for() -> None:
    async with serving() as (gateway, stub):
        answer = ask(stub, echo=True, max_tokens=0)
        submit = await told(gateway.worker)
        assert submit.max_tokens == 1
        gateway.worker.step(token(submit.forks[0], 0, 8, end=LENGTH))
        responses, code = await answer
        assert code is grpc.StatusCode.OK
        assert not any(response.chunk.tokens for response in responses)
        finished = responses[-1].finished
        assert (finished.finish_reason, finished.usage.completion_tokens) == (pb.FINISH_REASON_LENGTH, 0)


async def test_a_step_without_tokens_says_nothing_to_anybody() -> None:
    async with serving() as (gateway, stub):
        answer = ask(stub)
        (fork,) = await submitted(gateway.worker)
        gateway.worker.step()
        gateway.worker.step(worker_pb2.SequenceOutput(sequence_id=fork.sequence_id))
        gateway.worker.step(token(fork, 0, 3, end=STOP))
        responses, _ = await answer
        assert [response.WhichOneof("event") for response in responses] == ["accepted", "chunk", "finished"]


async def test_a_conversation_is_written_by_the_template_and_tokenized_as_it_is() -> None:
    async with serving(chat_template=CHATML) as (gateway, stub):
        messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]
        for skip, expected in ((False, "system be kind\nuser hi\nassistant "), (True, "system be kind\nuser hi\n")):
            chat = {"messages": messages, "skip_generation_prompt": skip}
            message = pb.GenerateRequest(chat=chat, echo=True)
            answer = asyncio.create_task(collect(stub.Generate(message)))
            submit = await told(gateway.worker)
            assert BOS not in submit.prompt_ids
            gateway.worker.step(token(submit.forks[0], 0, 3, end=STOP))
            responses, _ = await answer
            assert responses[1].echo.text == expected


async def test_what_an_answer_must_match_reaches_the_replica_of_every_choice() -> None:
    async with serving() as (gateway, stub):
        answer = ask(stub, structured_output={"regex": "a|b"}, num_choices=2)
        submit = await told(gateway.worker)
        assert len(submit.forks) == 2 and submit.grammar.regex == "a|b"
        sequence_id, problem = submit.forks[0].sequence_id, "is too much for it"
        gateway.worker.reject(sequence_id, code_pb2.INVALID_ARGUMENT, problem, grammar_problem=problem)
        responses, code = await answer
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert responses[-1].finished.error.message.startswith("structured_output: ")


@pytest.mark.parametrize("output", [{"regex": "(a"}, {"json_schema": "{"}, {"grammar": ""}])
async def test_what_no_answer_can_match_is_refused_before_a_replica_hears_of_it(output: dict[str, str]) -> None:
    async with serving() as (gateway, stub):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Generate(pb.GenerateRequest(prompt="abc", structured_output=output)).read()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert (caught.value.details() or "").startswith("structured_output")
        assert gateway.worker.submits.empty()


@pytest.mark.parametrize(
    ("template", "chat", "field", "fix"),
    [
        (None, {"messages": [{"role": "user", "content": "hi"}]}, "chat:", "chat_template.jinja"),
        (CHATML, {}, "chat.messages:", "at least one"),
        (CHATML, {"messages": [{"role": "user", "content": "hi " * 5000}]}, "chat:", "shorter"),
        (CHATML, {"messages": [{}] * 4097}, "chat.messages:", "at most 4096"),
        (
            "{{ raise_exception('who is ' + messages[0].role) }}",
            {"messages": [{"role": "elf", "content": "hi"}]},
            "chat:",
            "who is elf",
        ),
    ],
)
async def test_a_conversation_that_cannot_be_is_refused_with_a_fix(
    template: str | None, chat: dict[str, Any], field: str, fix: str
) -> None:
    async with serving(chat_template=template) as (_, stub):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Generate(pb.GenerateRequest(chat=chat)).read()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        details = caught.value.details() or ""
        assert details.startswith(field) and fix in details


async def test_a_request_out_of_time_ends_with_its_last_message_and_is_cancelled() -> None:
    async with serving(request_timeout_s=0.2) as (gateway, stub):
        answer = ask(stub, num_choices=2)
        forks = await submitted(gateway.worker, 2)
        responses, code = await answer
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert responses[-1].finished.error.code == code_pb2.DEADLINE_EXCEEDED
        cancelled = [await asyncio.wait_for(gateway.worker.cancels.get(), PATIENCE_S) for _ in forks]
        assert sorted(cancelled) == [fork.sequence_id for fork in forks]


async def test_more_choices_than_there_are_slots_are_refused_and_fewer_wait_for_theirs() -> None:
    async with serving() as (gateway, stub):
        async with gateway.admission.slot(weight=60):
            answer = ask(stub, num_choices=5)
            await until(lambda: gateway.admission.queued == 1)
        forks = await submitted(gateway.worker, 5)
        gateway.worker.step(*(token(fork, 0, 3, end=STOP) for fork in forks))
        assert (await answer)[1] is grpc.StatusCode.OK
        gateway.admission.max_in_flight = 4
        with pytest.raises(grpc.aio.AioRpcError, match="at most 4") as caught:
            await stub.Generate(pb.GenerateRequest(prompt="abc", num_choices=5)).read()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        gateway.admission.max_in_flight = 64


async def test_a_request_of_two_replicas_names_the_one_that_computes_the_prompt_and_tells_the_client_of_it() -> None:
    async with serving(has_helper=True) as (gateway, stub):
        answer = ask(stub, num_choices=2)
        submit = await told(gateway.worker)
        source = worker_pb2.PrefillSource(replica="replica-1", epoch=EPOCH + 1, address="127.0.0.1:1")
        assert submit.prefill == source
        one, two = submit.forks
        transfer = worker_pb2.KvTransfer(num_tokens=2, num_bytes=64, prefill_s=0.5, exposed_s=0.25)
        gateway.worker.step(token(one, 0, 3, end=LENGTH, transfer=transfer), token(two, 0, 4, end=LENGTH))
        responses, code = await answer
        assert code is grpc.StatusCode.OK and texts(responses) == {0: "d", 1: "e"}
        finished = responses[-1].finished
        assert (finished.replica, finished.prefill_replica) == ("replica-0", "replica-1")
        assert finished.transfer == pb.KvTransfer(num_tokens=2, num_bytes=64, prefill_s=0.5, exposed_s=0.25)
