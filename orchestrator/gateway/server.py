"""Runs the gateway process: builds its parts, serves, and drains when it is told to stop."""

import asyncio
import contextlib
import gc
import logging
import os
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

from orchestrator.background import BackgroundTasks
from orchestrator.config.document import Config
from orchestrator.config.limits import replica_limits
from orchestrator.gateway.figures import load_reports, observe
from orchestrator.gateway.fleet.admission import Admission
from orchestrator.gateway.fleet.fleet import Fleet
from orchestrator.gateway.fleet.leader import LeaderLimits
from orchestrator.gateway.generate import Generator
from orchestrator.gateway.http.app import make_app
from orchestrator.gateway.http.exchange import Service
from orchestrator.gateway.http.server import HttpServer
from orchestrator.gateway.load_log import LoadLog
from orchestrator.gateway.model import ServedModel, longest_token_bytes
from orchestrator.gateway.request.reader import RequestReader
from orchestrator.gateway.service import AdminService, InferenceService
from orchestrator.gateway.timeline import Timeline
from orchestrator.model_dir.files import read_model_files
from orchestrator.telemetry.requests import Telemetry
from orchestrator.telemetry.vllm_metrics import VllmMetrics
from placement.errors import InvalidConfig
from placement.model.specs import DType
from placement.serving.kv.portions import bytes_per_token
from protos.codec.child_process import Listening
from protos.codec.log_record import said
from protos.heterodyne.v1 import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc
from protos.heterodyne.worker.v1 import worker_pb2

logger = logging.getLogger(__name__)

_INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
_ADMIN = admin_pb2.DESCRIPTOR.services_by_name["Admin"].full_name
_SERVER_OPTIONS = [
    # Without this a second gateway could share the port unseen.
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", 8 << 20),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 500),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
]
_LAST_WORDS_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewaySettings:
    """Holds what the gateway is started with.

    Attributes:
        max_context_tokens: the context that the plan gives, at most the model's own.
        dtype: the number type that the plan computes in.
        tied_embeddings: whether the plan takes the embedding for the output head too; None: to be found out.
    """

    config: Config
    control_address: str
    max_context_tokens: int
    dtype: DType
    tied_embeddings: bool | None = None


class Gateway:
    """Serves the public services of one deployment. Lives on one event loop.

    Attributes:
        fleet: the replicas as it knows them.
        admission: what is in flight and what waits.
        generator: serves requests and keeps their journal.
        http_address: where it listens for HTTP, once it does; None where it is not to.
    """

    def __init__(self, settings: GatewaySettings) -> None:
        config = settings.config
        self._config = config
        self._draining = False
        self._health_lock = asyncio.Lock()
        model = load_model(settings)
        self.admission = Admission(config.gateway.max_in_flight, config.gateway.max_queued)
        self.fleet = Fleet(
            control_address=settings.control_address,
            limits=LeaderLimits(
                heartbeat_timeout_s=config.gateway.heartbeat_timeout_s,
                stall_timeout_s=config.gateway.stall_timeout_s,
            ),
            sizes=replica_limits(config),
            on_change=self._health_changed,
            on_step=self._stepped,
            disaggregation=config.serving.disaggregation,
            kv_bytes_per_token=bytes_per_token(
                model.spec,
                dtype=settings.dtype,
                format=config.serving.kv_format,
                block_size=config.serving.block_size,
            ),
        )
        self._timeline = Timeline(model=model.name)
        self._load_log = LoadLog(self.fleet, self.admission)
        self._vllm = self._vllm_metrics(model) if config.telemetry.vllm_metrics else None
        self._telemetry = self._make_telemetry()
        self._requests = RequestReader(model=model, admission=self.admission)
        self.generator = Generator(model=model, fleet=self.fleet, admission=self.admission, telemetry=self._telemetry)
        self._health = health_aio.HealthServicer()
        self._server = self._make_server(model)
        self._http = self._make_http(model)
        self.http_address: str | None = None
        self._background = BackgroundTasks()

    def _make_server(self, model: ServedModel) -> grpc.aio.Server:
        server = grpc.aio.server(options=_SERVER_OPTIONS)
        inference = InferenceService(
            model=model,
            requests=self._requests,
            generator=self.generator,
            telemetry=self._telemetry,
            request_timeout_s=self._config.gateway.request_timeout_s,
        )
        admin = AdminService(
            model=model,
            fleet=self.fleet,
            admission=self.admission,
            timeline=self._timeline,
            load_log=self._load_log,
        )
        inference_pb2_grpc.add_InferenceServicer_to_server(inference, server)
        admin_pb2_grpc.add_AdminServicer_to_server(admin, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection(
            (
                _INFERENCE,
                _ADMIN,
                health_pb2.DESCRIPTOR.services_by_name["Health"].full_name,
                reflection.SERVICE_NAME,
            ),
            server,
        )
        return server

    def _make_http(self, model: ServedModel) -> HttpServer | None:
        address = self._config.gateway.http_address
        if address is None:
            return None
        service = Service(
            model=model,
            requests=self._requests,
            generator=self.generator,
            telemetry=self._telemetry,
            request_timeout_s=self._config.gateway.request_timeout_s,
            is_serving=lambda: self._is_serving,
        )
        return HttpServer(make_app(service), address)

    def _make_telemetry(self) -> Telemetry:
        vllm = [] if self._vllm is None else [self._vllm]
        telemetry = Telemetry(
            self._config.telemetry,
            observers=[self._timeline.finished, *(metrics.finished for metrics in vllm)],
            collectors=vllm,
        )
        observe(telemetry, admission=self.admission, fleet=self.fleet)
        return telemetry

    def _vllm_metrics(self, model: ServedModel) -> VllmMetrics:
        return VllmMetrics(
            model=model.name,
            max_context_tokens=model.max_context_tokens,
            block_size=self._block_size,
            reports=lambda: load_reports(self.fleet),
            num_queued=lambda: self.admission.queued + self.fleet.num_waiting,
        )

    def _block_size(self, replica: str) -> int:
        """Returns the tokens of a KV block of a replica, as the controller says; those of all before it has."""
        told = (each.block_size for each in self.fleet.deployment.replicas if each.name == replica and each.block_size)
        return next(told, self._config.serving.block_size)

    def _stepped(self, replica: str, step: worker_pb2.StepOutput) -> None:
        self._timeline.stepped(replica, step)
        if self._vllm is not None:
            self._vllm.stepped(replica, step)

    async def start(self) -> str:
        """Listens and follows the controller; returns the address of the gRPC services.

        Raises:
            InvalidConfig: an address cannot be listened on.
        """
        address = self._config.gateway.address
        try:
            port = self._server.add_insecure_port(str(address))
        except RuntimeError as error:
            raise InvalidConfig(
                field="gateway.address",
                value=str(address),
                problem="cannot be listened on",
                fix="Choose a free port of this host.",
            ) from error
        await self._set_health()
        await self._server.start()
        if self._http is not None:
            self.http_address = str(await self._http.start())
        self._background.spawn(self.fleet.follow())
        self._background.spawn(self._load_log.run())
        return str(replace(address, port=port))

    async def drain(self, cut: asyncio.Event | None = None) -> bool:
        """Reports NOT_SERVING, waits a grace period for what is in flight, then ends; returns whether all finished.

        Called again it does nothing and returns True.

        Args:
            cut: ends the grace period when it is set.
        """
        if self._draining:
            return True
        self._draining = True
        self.admission.start_drain()
        await self._set_health()
        began_s = time.monotonic()
        idle = await self._wait_idle(self._config.gateway.drain_grace_s, cut)
        if not idle:
            _say_cut(self.admission.in_flight + self.admission.queued, time.monotonic() - began_s)
            # What is cut still ends as promised, with a last message that says why.
            self.fleet.stop()
            await self.admission.wait_idle(_LAST_WORDS_S)
        self.fleet.drain()
        await asyncio.gather(self._server.stop(_LAST_WORDS_S), *(() if self._http is None else (self._http.stop(),)))
        await self._requests.close()
        await self._background.close()
        await self.fleet.close()
        await asyncio.to_thread(self._telemetry.close)
        return idle

    async def _wait_idle(self, grace_s: float, cut: asyncio.Event | None) -> bool:
        idle = asyncio.ensure_future(self.admission.wait_idle(grace_s))
        cutting = asyncio.ensure_future((cut or asyncio.Event()).wait())
        await asyncio.wait({idle, cutting}, return_when=asyncio.FIRST_COMPLETED)
        for waiting in (idle, cutting):
            waiting.cancel()
        return idle.done() and not idle.cancelled() and idle.result()

    @property
    def _is_serving(self) -> bool:
        return self.fleet.accepting and not self._draining

    def _health_changed(self) -> None:
        self._background.spawn(self._set_health())

    async def _set_health(self) -> None:
        # One at a time, each reading the state anew: the last to run tells the truth.
        async with self._health_lock:
            serving = self._is_serving
            state = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
            for service in ("", _INFERENCE):
                await self._health.set(service, state)
            # Status can be asked for as long as the gateway lives.
            await self._health.set(_ADMIN, health_pb2.HealthCheckResponse.SERVING)


def _say_cut(num_cut: int, after_s: float) -> None:
    requests = "1 request" if num_cut == 1 else f"{num_cut} requests"
    extra = said("drain_cut", in_flight=num_cut, after_s=round(after_s, 1))
    logger.warning("Stopped after %.1f s; %s had not finished.", after_s, requests, extra=extra)


def load_model(settings: GatewaySettings) -> ServedModel:
    """Reads the served model from its directory. Raises InvalidModel."""
    config = settings.config
    directory = Path(config.model.path)
    files = read_model_files(directory, tied_embeddings=settings.tied_embeddings)
    return ServedModel(
        name=config.model.name or directory.name,
        spec=files.spec,
        dtype=settings.dtype,
        max_context_tokens=settings.max_context_tokens,
        tokenizer=files.tokenizer,
        max_token_bytes=longest_token_bytes(files.tokenizer),
        defaults=files.defaults,
        chat_template=files.chat_template,
        directory=directory.resolve(),
        tokenizer_config=files.tokenizer_config,
    )


async def run(settings: GatewaySettings) -> int:
    """Serves until SIGTERM or SIGINT, then drains. Says where it listens in one JSON line on standard output."""
    gateway = Gateway(settings)
    stop, cut = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def request_stop(number: int, _frame: FrameType | None) -> None:
        # Not the loop's own handlers: those fall away when it closes, and a second signal then kills what has drained.
        event = cut if stop.is_set() and number == signal.SIGINT else stop
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(event.set)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, request_stop)
    address = await gateway.start()
    # Modules and classes stay for good: looking through them for garbage would hold every stream up for some 20 ms.
    gc.collect()
    gc.freeze()
    listening = Listening(address=address, pid=os.getpid(), http_address=gateway.http_address or "")
    print(listening.line(), flush=True)
    await stop.wait()
    finished = await gateway.drain(cut)
    for number in (signal.SIGTERM, signal.SIGINT):
        # The interpreter resets handlers of ours on its way out, but leaves this; what has drained is not killed.
        signal.signal(number, signal.SIG_IGN)
    return 0 if finished else 1
