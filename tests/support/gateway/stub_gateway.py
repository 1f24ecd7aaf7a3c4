"""The gateway's public service over a leader stream that says what a test wants: no worker, no model, no torch."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import grpc
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from orchestrator.config.document import TelemetryConfig
from orchestrator.config.types import Address
from orchestrator.gateway.fleet.admission import Admission
from orchestrator.gateway.fleet.fleet import Bound, Fleet
from orchestrator.gateway.fleet.leader import Leader, LeaderLimits
from orchestrator.gateway.generate import Generator
from orchestrator.gateway.http.app import make_app
from orchestrator.gateway.http.exchange import Service
from orchestrator.gateway.http.server import HttpServer
from orchestrator.gateway.model import ServedModel, longest_token_bytes
from orchestrator.gateway.request.reader import RequestReader
from orchestrator.gateway.service import InferenceService
from orchestrator.model_dir.chat import ChatTemplate
from orchestrator.model_dir.default_sampling import DefaultSampling
from orchestrator.telemetry.requests import Telemetry
from placement.model.hf import read_model_spec
from placement.model.specs import DType
from placement.serving.routing.choice import Route
from placement.serving.routing.router import Prompt
from protos.heterodyne.v1 import inference_pb2_grpc
from protos.heterodyne.worker.v1 import worker_pb2 as pb
from protos.heterodyne.worker.v1 import worker_pb2_grpc

EPOCH = 4
NUM_LETTERS = 26
BOS, EOS, VOCAB_SIZE = 26, 27, 32
CONTEXT = 64


def letters() -> Tokenizer:
    """Id i is the letter of that number; 26 and 27 begin and end a text; 28 is a blank, 29 a line's end."""
    vocabulary = {chr(ord("a") + i): i for i in range(NUM_LETTERS)} | {"Ġ": 28, "Ċ": 29}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def served_model(
    *, defaults: DefaultSampling | None = None, chat_template: str | None = None, context: int = CONTEXT
) -> ServedModel:
    """A model of 32 tokens, the letters among them."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "eos_token_id": EOS,
    }
    tokenizer = letters()
    return ServedModel(
        name="letters",
        spec=read_model_spec(config),
        dtype=DType.FLOAT32,
        max_context_tokens=context,
        tokenizer=tokenizer,
        max_token_bytes=longest_token_bytes(tokenizer),
        defaults=defaults or DefaultSampling(),
        chat_template=None if chat_template is None else ChatTemplate(chat_template, special_tokens={}),
    )


@dataclass
class StubWorker(worker_pb2_grpc.WorkerServicer):
    """Keeps what it hears, says what is put in ``replies``."""

    replies: asyncio.Queue[pb.LeadResponse] = field(default_factory=asyncio.Queue)
    submits: asyncio.Queue[pb.Submit] = field(default_factory=asyncio.Queue)
    cancels: asyncio.Queue[int] = field(default_factory=asyncio.Queue)
    submitted_bytes: int = 0

    async def Lead(self, request_iterator: Any, context: Any) -> AsyncIterator[pb.LeadResponse]:
        async def listen() -> None:
            async for request in request_iterator:
                match request.WhichOneof("command"):
                    case "submit":
                        self.submitted_bytes += request.ByteSize()
                        self.submits.put_nowait(request.submit)
                    case "cancel":
                        self.cancels.put_nowait(request.cancel.sequence_id)

        listening = asyncio.create_task(listen())
        try:
            while True:
                yield await self.replies.get()
        finally:
            listening.cancel()

    def step(self, *outputs: pb.SequenceOutput) -> None:
        """One step with these outputs."""
        self.replies.put_nowait(pb.LeadResponse(epoch=EPOCH, step=pb.StepOutput(sequences=outputs)))

    def reject(self, sequence_id: int, code: int, message: str, **fields: str) -> None:
        """Do not take a submission."""
        rejected = pb.Rejected(sequence_id=sequence_id, code=code, message=message, **fields)
        self.replies.put_nowait(pb.LeadResponse(epoch=EPOCH, rejected=rejected))


@dataclass(frozen=True)
class OneLeader:
    """The part of a fleet that Generate needs.

    ``helper`` is the leader of a replica that computes the prompts.
    """

    leader: Leader
    helper: Leader | None = None

    async def route(self, prompt: Prompt, *, priority: int = 0, timeout_s: float | None = None) -> Bound:
        route = Route(
            replica=self.leader.name,
            prefill=None if self.helper is None else self.helper.name,
            reason="it is the only one",
            new_tokens=len(prompt.token_ids),
        )
        return Bound(leader=self.leader, route=route, helper=self.helper)


@dataclass(frozen=True)
class StubGateway:
    """What runs."""

    address: str
    http: str
    worker: StubWorker
    leader: Leader
    generator: Generator
    admission: Admission


@asynccontextmanager
async def stub_gateway(
    model: ServedModel,
    *,
    request_timeout_s: float = 30.0,
    has_helper: bool = False,
    max_in_flight: int = 64,
    max_queued: int = 64,
) -> AsyncIterator[StubGateway]:
    """Serve ``model`` on free ports, by gRPC and HTTP; the worker behind it is the test's.

    A helper is a replica that nobody reaches.
    """
    worker, worker_server = StubWorker(), grpc.aio.server()
    worker_pb2_grpc.add_WorkerServicer_to_server(worker, worker_server)
    worker_port = worker_server.add_insecure_port("127.0.0.1:0")
    await worker_server.start()
    limits = LeaderLimits(heartbeat_timeout_s=60.0, stall_timeout_s=60.0)
    leader = Leader(name="replica-0", epoch=EPOCH, address=f"127.0.0.1:{worker_port}", limits=limits)
    following = asyncio.create_task(leader.run(lambda: None))
    worker.replies.put_nowait(pb.LeadResponse(epoch=EPOCH, load=pb.LoadReport(total_blocks=8, free_blocks=8)))
    admission = Admission(max_in_flight, max_queued)
    telemetry = Telemetry(TelemetryConfig())
    helper = Leader(name="replica-1", epoch=EPOCH + 1, address="127.0.0.1:1", limits=limits) if has_helper else None
    fleet = cast(Fleet, OneLeader(leader, helper))
    generator = Generator(model=model, fleet=fleet, admission=admission, telemetry=telemetry)
    requests = RequestReader(model=model, admission=admission)
    server = grpc.aio.server()
    service = InferenceService(
        model=model,
        requests=requests,
        generator=generator,
        telemetry=telemetry,
        request_timeout_s=request_timeout_s,
    )
    inference_pb2_grpc.add_InferenceServicer_to_server(service, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    http = HttpServer(
        make_app(
            Service(
                model=model,
                requests=requests,
                generator=generator,
                telemetry=telemetry,
                request_timeout_s=request_timeout_s,
                is_serving=lambda: leader.accepting,
            )
        ),
        Address("127.0.0.1", 0),
    )
    http_address = await http.start()
    try:
        await until(lambda: leader.accepting)
        yield StubGateway(
            address=address,
            http=str(http_address),
            worker=worker,
            leader=leader,
            generator=generator,
            admission=admission,
        )
    finally:
        await http.stop()
        await server.stop(0.0)
        await requests.close()
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        await worker_server.stop(0.0)
        telemetry.close()


async def until(true: Callable[[], bool], timeout_s: float = 5.0) -> None:
    """Wait until it is."""
    async with asyncio.timeout(timeout_s):
        while not true():
            await asyncio.sleep(0.005)
