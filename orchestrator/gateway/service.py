"""Serves the public gRPC services, Inference and Admin, over the parts that do the work."""

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Any

import grpc
from google.rpc import code_pb2

from orchestrator.gateway import measured
from orchestrator.gateway.errors import ReplicaFault
from orchestrator.gateway.fleet.admission import Admission
from orchestrator.gateway.fleet.fleet import Fleet
from orchestrator.gateway.fleet.throughput import Rates
from orchestrator.gateway.generate import Generator
from orchestrator.gateway.grpc_client import grpc_client
from orchestrator.gateway.load_log import LoadLog
from orchestrator.gateway.model import ServedModel
from orchestrator.gateway.request.reader import RequestReader
from orchestrator.gateway.request.request import check_ids, check_model
from orchestrator.gateway.request.text_work import TextWork
from orchestrator.gateway.status import abort, code_of
from orchestrator.gateway.timeline import Timeline
from orchestrator.telemetry.requests import Telemetry
from placement.errors import HeterodyneError
from placement.serving.routing.binding import WaitReason
from placement.serving.routing.choice import RouteKind
from protos.codec.formats import read_dtype
from protos.codec.loading import doing
from protos.codec.log_record import said
from protos.codec.roles import read_role
from protos.heterodyne.control.v1 import control_pb2
from protos.heterodyne.v1 import admin_pb2, admin_pb2_grpc, inference_pb2_grpc
from protos.heterodyne.v1 import inference_pb2 as pb
from protos.heterodyne.worker.v1 import worker_pb2

logger = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]

# How long Tokenize and Detokenize may wait and take.
_CONVERSION_S = 30.0

_STATES = {
    control_pb2.PHASE_STARTING: admin_pb2.REPLICA_STATE_STARTING,
    control_pb2.PHASE_LOADING: admin_pb2.REPLICA_STATE_STARTING,
    control_pb2.PHASE_READY: admin_pb2.REPLICA_STATE_READY,
    control_pb2.PHASE_DRAINING: admin_pb2.REPLICA_STATE_DRAINING,
    control_pb2.PHASE_FAILED: admin_pb2.REPLICA_STATE_FAILED,
    control_pb2.PHASE_STOPPED: admin_pb2.REPLICA_STATE_STOPPED,
}


_BEFORE_READY = (control_pb2.PHASE_STARTING, control_pb2.PHASE_LOADING)


class InferenceService(inference_pb2_grpc.InferenceServicer):
    """Serves heterodyne.v1.Inference."""

    def __init__(
        self,
        *,
        model: ServedModel,
        requests: RequestReader,
        generator: Generator,
        telemetry: Telemetry,
        request_timeout_s: float,
    ) -> None:
        self._model = model
        self._requests = requests
        self._generator = generator
        self._telemetry = telemetry
        self._request_timeout_s = request_timeout_s
        self._conversions = TextWork(model)

    # The stubs know handlers of streams as generators only; gRPC takes coroutines that write as well, and those end
    # in order when a client goes.
    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:  # type: ignore[override]
        """Streams an answer. Before acceptance an error is a status; after it, the last message holds it too."""
        client = grpc_client(context, max_timeout_s=self._request_timeout_s)
        try:
            outcome = await self._generator.generate(await self._requests.read(request, client), client)
        except HeterodyneError as error:
            self._telemetry.refused(code_pb2.Code.Name(code_of(error)))
            await abort(context, error)
        except Exception:
            # What gRPC would tell the client by itself may hold anything; this holds nothing.
            words = "A request failed in a way that nobody foresaw."
            logger.exception(words, extra=said("request_failed"))
            await abort(context, ReplicaFault("the service failed; its log says how"))
        if isinstance(outcome, HeterodyneError):
            await abort(context, outcome)

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        """Converts text to token ids."""
        try:
            check_model(request.model, self._model)
            special = not request.skip_special_tokens
            ids = await self._conversions.tokenize(request.text, field="text", special=special, timeout_s=_CONVERSION_S)
        except HeterodyneError as error:
            await abort(context, error)
        return pb.TokenizeResponse(ids=ids)

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Context) -> pb.DetokenizeResponse:
        """Converts token ids to text."""
        try:
            check_model(request.model, self._model)
            check_ids(request.ids, self._model)
            skip = not request.keep_special_tokens
            text = await self._conversions.detokenize(request.ids, skip_special=skip, timeout_s=_CONVERSION_S)
        except HeterodyneError as error:
            await abort(context, error)
        return pb.DetokenizeResponse(text=text)

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        """Lists the one model."""
        return pb.ListModelsResponse(models=[self._model.message()])

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        """Describes the one model, by name."""
        try:
            check_model(request.name, self._model)
        except HeterodyneError as error:
            await abort(context, error)
        return pb.GetModelResponse(model=self._model.message())


class AdminService(admin_pb2_grpc.AdminServicer):
    """Serves heterodyne.v1.Admin."""

    def __init__(
        self, *, model: ServedModel, fleet: Fleet, admission: Admission, timeline: Timeline, load_log: LoadLog
    ) -> None:
        self._model = model
        self._fleet = fleet
        self._admission = admission
        self._timeline = timeline
        self._load_log = load_log
        self._building = asyncio.Lock()  # one timeline at a time: each holds megabytes
        self._started_s = time.monotonic()

    async def GetStatus(self, request: admin_pb2.GetStatusRequest, context: Context) -> admin_pb2.GetStatusResponse:
        """Says who holds what, in which state and under which load."""
        admission = self._admission
        return admin_pb2.GetStatusResponse(
            model=self._model.name,
            gateway=admin_pb2.GatewayStatus(
                in_flight=admission.in_flight,
                queued=admission.queued,
                max_in_flight=admission.max_in_flight,
                max_queued=admission.max_queued,
                draining=admission.draining,
                uptime_s=time.monotonic() - self._started_s,
                controller_connected=self._fleet.controller_connected,
                fenced_messages=self._fleet.fenced_messages,
                waiting=_counts(self._fleet.waiting()),
                routes=_counts(self._fleet.routes),
            ),
            replicas=[self._replica(replica) for replica in self._fleet.deployment.replicas],
            context_tokens=self._model.max_context_tokens,
            model_context_tokens=self._model.spec.max_context_tokens,
            dtype=_dtype(self._fleet.deployment.dtype),
            attention=_attention(self._fleet.deployment),
            offloading=self._fleet.deployment.offloading,
        )

    async def GetTimeline(
        self, request: admin_pb2.GetTimelineRequest, context: Context
    ) -> admin_pb2.GetTimelineResponse:
        """Says when the latest requests and steps happened."""
        async with self._building:
            try:
                snapshot = self._timeline.snapshot(request.last_s if request.HasField("last_s") else None)
            except HeterodyneError as error:
                await abort(context, error)
            return await asyncio.to_thread(snapshot.message)

    def _replica(self, replica: control_pb2.Replica) -> admin_pb2.ReplicaStatus:
        message = admin_pb2.ReplicaStatus(
            **_state(replica),
            ranks=[_rank(rank) for rank in replica.ranks],
            role="" if replica.role == control_pb2.ROLE_UNSPECIFIED else read_role(replica.role).value,
            dtype=_dtype(replica.dtype),
            block_size=replica.block_size,
        )
        leader = self._fleet.leader(replica.name, replica.epoch)
        if leader is not None and leader.lost is not None:
            # The gateway sees a broken stream before the controller has said so.
            message.state = admin_pb2.REPLICA_STATE_FAILED
            message.cause = replica.cause or leader.lost.cause
        if leader is not None and leader.load is not None and leader.lost is None:
            rates = self._load_log.rates(replica.name, replica.epoch)
            message.load.CopyFrom(_load(leader.load, rates, age_s=leader.report_age_s))
            message.budget.CopyFrom(measured.step_budget(leader.load.budget))
        return message


def _state(group: control_pb2.Replica) -> dict[str, Any]:
    return {
        "name": group.name,
        "state": _STATES.get(group.phase, admin_pb2.REPLICA_STATE_UNSPECIFIED),
        "epoch": group.epoch,
        "cause": group.cause,
    }


def _attention(deployment: control_pb2.WatchResponse) -> admin_pb2.ReplicaStatus | None:
    """Returns how the attention workers are; None where there are none."""
    if not deployment.HasField("attention"):
        return None
    group = deployment.attention
    return admin_pb2.ReplicaStatus(**_state(group), ranks=[_rank(rank) for rank in group.ranks])


def _load(load: worker_pb2.LoadReport, rates: Rates | None, *, age_s: float) -> admin_pb2.ReplicaLoad:
    return admin_pb2.ReplicaLoad(
        num_running=load.num_running,
        num_waiting=load.num_waiting,
        free_blocks=load.free_blocks,
        total_blocks=load.total_blocks,
        steps=load.steps,
        num_preemptions=load.num_preemptions,
        age_s=age_s,
        prompt_tokens_per_s=None if rates is None else rates.prompt_tokens_per_s,
        generated_tokens_per_s=None if rates is None else rates.generated_tokens_per_s,
        prefix_cache_hit_rate=None if rates is None else rates.prefix_cache_hit_rate,
        num_moving=load.num_moving,
        kv_transfers=load.kv_transfers,
        kv_failures=load.kv_failures,
        kv_bytes=load.kv_bytes,
        kv_refused=load.kv_refused,
    )


def _counts(counts: Mapping[WaitReason, int] | Mapping[RouteKind, int]) -> list[admin_pb2.Count]:
    return [admin_pb2.Count(kind=kind.value, count=count) for kind, count in sorted(counts.items()) if count]


def _dtype(message: worker_pb2.Dtype.ValueType) -> str:
    """Returns the name of a number type; empty before the controller has told it."""
    return "" if message == worker_pb2.DTYPE_UNSPECIFIED else read_dtype(message).value


def _rank(rank: control_pb2.Rank) -> admin_pb2.RankStatus:
    return admin_pb2.RankStatus(
        token_share=rank.token_share if rank.HasField("token_share") else None,
        rank=rank.rank,
        node=rank.node,
        device=rank.device,
        target=rank.target,
        address=rank.address,
        pid=rank.pid,
        first_layer=rank.shard.layers.start,
        last_layer=rank.shard.layers.stop,
        weight_bytes=rank.weight_bytes,
        kv_bytes=rank.kv_bytes,
        loaded_bytes=rank.loaded_bytes,
        cause=rank.cause,
        worker=rank.worker,
        load_phase=doing(rank) if rank.phase in _BEFORE_READY else "",
        num_kv_heads=_length(rank.shard.kv_heads),
        num_ffn_columns=_length(rank.shard.ffn_columns),
        sums=measured.sums(rank.measured),
        overlap=measured.overlap(rank.measured),
        exchange=measured.exchange(rank.measured),
        holds=rank.holds,
    )


def _length(span: worker_pb2.Range) -> int:
    return span.stop - span.start
