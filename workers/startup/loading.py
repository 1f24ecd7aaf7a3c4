"""Loading a rank: read the config, load the shard's weights, set the KV blocks aside, warm up, build the engine."""

import os
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from kernels.select import kernels_for
from placement.errors import InvalidRequest, NotEnoughMemory, cause_of
from placement.model.part import Part
from placement.model.quantization import LinearFormat, check_linear_format
from placement.model.specs import ModelSpec
from placement.model.weights import shard_tensors
from placement.planning.memory import format_bytes
from placement.serving.admission import Limits
from placement.serving.replica import ReplicaCore
from placement.serving.settings import Checks, CoreSettings
from placement.serving.step_plan import SchedulerLimits
from protos.codec.formats import read_dtype
from protos.heterodyne.worker.v1 import worker_pb2 as pb
from workers.engine.engine import Engine
from workers.engine.types import STOPS, Runner, Stopping
from workers.host.device import TORCH_DTYPES, Device, is_out_of_memory, use_device
from workers.model.kv_cache import allocate_kv_cache, kv_cache_bytes
from workers.replica.follower import Follower
from workers.replica.membership import Membership
from workers.replica.roster import Roster, read_roster
from workers.sampling.grammar import GrammarFactory
from workers.startup.checkpoint import load_weights
from workers.startup.checks import check_memory, check_request, kv_share, read_linear_format, read_model, reckon
from workers.startup.warm_up import capture_decodes, capture_for, executing_thread, warm_up
from workers.step.runner import ModelRunner

CHECK_VARIABLE = "HETERODYNE_CHECK_STATE"
"""The environment variable that has an engine assert its own state whenever it becomes idle."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A rank that is ready to run.

    Attributes:
        engine: of a leader.
        grammars: of a leader.
        follower: of any other rank.
        membership: None where the replica has one rank alone.
    """

    weight_bytes: int
    kv_bytes: int
    engine: Engine | None = None
    grammars: GrammarFactory | None = None
    follower: Follower | None = None
    membership: Membership | None = None

    @property
    def loop(self) -> Engine | Follower:
        """What runs."""
        loop = self.engine or self.follower
        assert loop is not None, "a rank leads or follows"
        return loop


class LoadJob:
    """One load, run in a thread of its own while the service reads ``phase`` and the byte counts."""

    def __init__(self, *, request: pb.LoadRequest, device: Device, listener: socket.socket | None = None) -> None:
        """``listener`` is where the other ranks connect; without one, the replica can have one rank alone."""
        self._request = request
        self._device = device
        self._listener = listener
        self._stopping = threading.Event()
        self.phase: pb.LoadPhase.ValueType = pb.LOAD_PHASE_WEIGHTS
        self.loaded_bytes = 0
        self.total_bytes = 0

    def stop(self) -> None:
        """Wait for no other rank any more."""
        self._stopping.set()

    def _go_on(self) -> None:
        if self._stopping.is_set():
            raise Stopping(STOPS)

    def run(self) -> Loaded:
        """Load everything.

        Raises:
            InvalidModel: the directory is missing something, damaged, or of a kind that is not served.
            InvalidRequest: the load asks for something impossible.
            NotEnoughMemory: the device has not the memory, by reckoning before anything is read or in fact.
            PeerFailed: another rank of the replica was lost.
            Stopping: it was stopped while it waited for another rank.
        """
        request, device = self._request, self._device
        use_device(device.torch_device)
        model = read_model(Path(request.model_path))
        dtype = read_dtype(request.dtype)
        check_request(request, model)
        roster = read_roster(request, model)
        slices = shard_tensors(model, roster.part)
        linear = read_linear_format(request)
        check_linear_format(slices, linear)
        need = reckon(request, model, roster, dtype, linear, on_cpu=device.torch_device.type == "cpu")
        share = kv_share(model, roster, block_size=request.block_size)
        check_memory(need, device.available_memory_bytes, where=device.name, kv_share=share)
        # Before this rank joins the others: reading a large tokenizer holds up all its threads, its pulse among them.
        grammars = None if roster.rank else self._grammars(model)
        membership = self._join(roster)
        try:
            loaded = self._load(model, roster, TORCH_DTYPES[dtype], linear, membership, grammars)
            self._go_on()  # else the others would count on a rank that nobody starts
            return loaded
        except BaseException as error:
            if membership is not None:
                membership.leave(cause_of(error))
            if not isinstance(error, MemoryError | RuntimeError):
                raise
            if not is_out_of_memory(error):
                raise
            raise NotEnoughMemory(
                field="serving.kv_cache",
                value=format_bytes(need.kv_bytes),
                problem=f"{device.name} ran out of memory while loading ({cause_of(error)})",
                fix="Lower it, free memory, or use a smaller model.",
            ) from error

    def _grammars(self, model: ModelSpec) -> GrammarFactory:
        path = Path(self._request.model_path)
        grammars = GrammarFactory(path, vocab_size=model.vocab_size, eos_token_ids=model.eos_token_ids)
        grammars.prepare()  # else the first request that asks for one would hold up all that is served
        return grammars

    def _join(self, roster: Roster) -> Membership | None:
        if len(roster.parts) == 1:
            return None
        if self._listener is None:
            raise InvalidRequest(
                field="members",
                value=len(roster.parts),
                problem="are several ranks, and this worker does not listen for others",
                fix="Send none.",
            )
        return Membership.join(self._listener, roster, epoch=self._request.epoch, go_on=self._go_on)

    def _load(
        self,
        model: ModelSpec,
        roster: Roster,
        dtype: torch.dtype,
        linear: LinearFormat | None,
        membership: Membership | None,
        grammars: GrammarFactory | None,
    ) -> Loaded:
        request, torch_device, part = self._request, self._device.torch_device, roster.part
        slices = shard_tensors(model, part)
        weights = load_weights(Path(request.model_path), slices, dtype, torch_device, self._progress, linear)
        self.phase = pb.LOAD_PHASE_KV_CACHE
        cache = allocate_kv_cache(
            model,
            num_slots=num_slots(request, part),
            dtype=dtype,
            device=self._device,
            layers=part.layers,
            kv_heads=part.kv_heads,
        )
        kernels = kernels_for(torch_device)
        sharing = (
            None
            if membership is None
            else membership.sharing(model, kernels, dtype, torch_device, token_budget=request.token_budget)
        )
        followers = None if membership is None or roster.rank else membership.followers()
        runner = ModelRunner(
            model=model,
            weights=weights,
            cache=cache,
            device=torch_device,
            kernels=kernels,
            part=part,
            group=None if membership is None else membership.group,
            team=followers,
            sharing=sharing,
        )
        self.phase = pb.LOAD_PHASE_WARM_UP
        num_stages = len(roster.stages)
        # The leader of a pipeline has a thread for each step that is on its way, and one for the next.
        threads = num_stages + 1 if num_stages > 1 and not roster.rank else 1
        executor = executing_thread(self._device, threads)
        if membership is not None:
            executor.submit(membership.get_ready, self._go_on, torch_device).result()
            executor.submit(
                membership.measure_runner,
                runner,
                sharing,
                token_budget=request.token_budget,
                num_slots=request.num_blocks * request.block_size,
                go_on=self._go_on,
            ).result()
        kv_bytes = kv_cache_bytes(cache)
        if membership is not None and followers is None:
            sizes = {"vocab_size": model.vocab_size, "slot_limit": request.num_blocks * request.block_size}
            follower = membership.follower(runner, executor, device=torch_device, **sizes)
            return Loaded(follower=follower, membership=membership, weight_bytes=self.loaded_bytes, kv_bytes=kv_bytes)
        leading = (
            runner if membership is None or followers is None else membership.leading(runner, followers, torch_device)
        )
        executor.submit(warm_up, leading, model=model, request=request).result()
        # The kernels of several ranks' sums are no part of a graph.
        capture = capture_for(torch_device, kernels) if membership is None else None
        if capture is not None:
            executor.submit(capture_decodes, runner, request, capture).result()
        return Loaded(
            engine=build_engine(leading, executor, request=request, model=model, num_stages=num_stages),
            grammars=grammars,
            membership=membership,
            weight_bytes=self.loaded_bytes,
            kv_bytes=kv_bytes,
        )

    def _progress(self, loaded_bytes: int, total_bytes: int) -> None:
        self.loaded_bytes, self.total_bytes = loaded_bytes, total_bytes


def num_slots(request: pb.LoadRequest, part: Part) -> int:
    """Slots of a rank's cache. With a stripe, its own of every block, and one for what other ranks hold."""
    if part.stripe is None:
        return request.num_blocks * request.block_size
    return request.num_blocks * part.stripe.width + 1


def build_engine(
    runner: Runner, executor: ThreadPoolExecutor, *, request: pb.LoadRequest, model: ModelSpec, num_stages: int = 1
) -> Engine:
    """The engine of a leader, not yet started."""
    settings = CoreSettings(
        limits=Limits(
            max_context_tokens=request.max_context_tokens, vocab_size=model.vocab_size, block_size=request.block_size
        ),
        steps=SchedulerLimits(
            token_budget=request.token_budget, max_num_seqs=request.max_num_seqs, num_batches=num_stages
        ),
        num_blocks=request.num_blocks,
        prefix_cache=request.prefix_cache,
        checks=Checks.AT_IDLE if os.environ.get(CHECK_VARIABLE) else Checks.NEVER,
    )
    return Engine(runner=runner, core=ReplicaCore(settings), executor=executor)
