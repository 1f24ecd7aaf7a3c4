"""Loads a rank: the configuration, the shard's weights, the KV cache, and then the engine or the follower."""

import logging
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

from torch import Tensor

from kernels.protocol import Kernels
from kernels.select import kernels_for, why_rounded_is_slow
from placement.errors import InvalidRequest, NotEnoughMemory, cause_of
from placement.measured.patience import Patience
from placement.model.specs import ModelSpec
from placement.model.weights import shard_tensors
from placement.planning.limits import ReplicaLimits
from placement.serving.token_budget import StepBudget, budget_of
from protos.codec.log_record import said
from protos.heterodyne.worker.v1 import worker_pb2 as pb
from workers.attention_worker.whereabouts import Whereabouts
from workers.attention_worker.worker import AttentionWorker
from workers.engine.engine import Engine
from workers.engine.types import STOPS, Runner, Stopping
from workers.host.device import TORCH_DTYPES, Device, is_out_of_memory, use_device
from workers.host.model_files import read_tokenizer_of
from workers.model.kv_cache import KVCache, allocate_kv_cache, kv_cache_bytes
from workers.offload.offloading import Offloading
from workers.replica.follower import Follower
from workers.replica.followers import Followers
from workers.replica.membership import Membership
from workers.replica.patience import STALL_TIMEOUT_S, PatientRunner
from workers.replica.roster import Roster
from workers.sampling.grammar import GrammarFactory
from workers.sequence_parallel.sharing import SequenceSharing
from workers.startup.building import build_engine, num_slots, num_threads
from workers.startup.checkpoint import load_weights
from workers.startup.checks import CheckedLoad, check_load
from workers.startup.facts import rank_facts
from workers.startup.holding import open_attention_worker
from workers.startup.offloading import open_offloading
from workers.startup.transfers import KvSide, open_kv_side
from workers.startup.warm_up import capture_decodes, capture_for, executing_thread, log_budget, warm_up
from workers.step.runner import ModelRunner

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A rank that is ready to run.

    Attributes:
        weight_bytes: bytes of its weights.
        kv_bytes: bytes of its KV cache.
        engine: the engine of a leader; None at other ranks.
        grammars: compiles the grammars of a leader; None at other ranks.
        follower: the loop of any other rank; None at the leader.
        membership: its connections with other ranks; None where the replica has one rank alone.
        budget: the token budget of a leader's steps, and what it measured; None at other ranks.
        kv_side: its side of transfers of keys and values; None where it takes part in none.
        offloading: its sessions with attention workers; None where it holds all keys and values itself.
        whereabouts: where these listen.
        attention_worker: serves model ranks, where the rank is an attention worker; it has no other loop then.
    """

    weight_bytes: int
    kv_bytes: int
    engine: Engine | None = None
    grammars: GrammarFactory | None = None
    follower: Follower | None = None
    membership: Membership | None = None
    budget: StepBudget | None = None
    kv_side: KvSide | None = None
    offloading: Offloading | None = None
    whereabouts: Whereabouts | None = None
    attention_worker: AttentionWorker | None = None

    @property
    def loop(self) -> Engine | Follower | AttentionWorker:
        """Returns the loop that the rank runs."""
        loop = self.engine or self.follower or self.attention_worker
        assert loop is not None, "a rank leads, follows, or is an attention worker"
        return loop


class LoadJob:
    """One load. It runs in a thread of its own while the service reads ``phase`` and the byte counts."""

    def __init__(self, *, request: pb.LoadRequest, device: Device, listener: socket.socket | None = None) -> None:
        """``listener`` is the socket that other ranks connect to; without one, the replica can have one rank alone."""
        self._request = request
        self._device = device
        self._listener = listener
        self._stopping = threading.Event()
        self._offloading: Offloading | None = None
        self.phase: pb.LoadPhase.ValueType = pb.LOAD_PHASE_WEIGHTS
        self.loaded_bytes = 0
        self.total_bytes = 0

    def stop(self) -> None:
        """Stops to wait for other ranks, and to read weights once the next tensor is there."""
        self._stopping.set()

    @cached_property
    def _kernels(self) -> Kernels:
        return kernels_for(self._device.torch_device)

    def _enter(self, phase: pb.LoadPhase.ValueType) -> None:
        self.phase = phase

    def _go_on(self) -> None:
        if self._stopping.is_set():
            raise Stopping(STOPS)

    def run(self) -> Loaded:
        """Loads everything.

        Raises:
            InvalidModel: the directory is missing something, damaged, or of a kind that is not served.
            InvalidRequest: the load asks for something impossible.
            NotEnoughMemory: the device has not the memory, by reckoning before anything is read or in fact.
            PeerFailed: another rank of the replica was lost.
            RanksDiffer: the ranks of the replica are not alike in what they must have in common.
            Stopping: it was stopped while it waited for another rank or read weights.
        """
        use_device(self._device.torch_device)
        if self._request.HasField("attention"):
            self._enter(pb.LOAD_PHASE_COMPILE)
            worker = open_attention_worker(self._request.attention, self._device, self._listener)
            return Loaded(attention_worker=worker, weight_bytes=0, kv_bytes=self._request.attention.kv_cache_bytes)
        checked = check_load(self._request, self._device)
        # Before this rank joins the others: reading a large tokenizer holds up all its threads, its pulse among them.
        grammars = self._grammars(checked.model) if checked.leads else None
        membership = self._join(checked.roster)
        try:
            if membership is not None:
                membership.agree(rank_facts(self._request, checked, self._device), go_on=self._go_on)
            self._enter(pb.LOAD_PHASE_WEIGHTS)
            loaded = self._load(checked, membership, grammars)
            self._go_on()  # else the others would count on a rank that nobody starts
            return loaded
        except BaseException as error:
            if membership is not None:
                membership.leave(cause_of(error))
            if not isinstance(error, MemoryError | RuntimeError) or not is_out_of_memory(error):
                raise
            raise NotEnoughMemory(
                field="serving.kv_cache",
                problem=f"{self._device.name} ran out of memory while loading ({cause_of(error)})",
                fix="Lower it, free memory, or use a smaller model.",
            ) from error

    def _grammars(self, model: ModelSpec) -> GrammarFactory:
        path = Path(self._request.model_path)
        read = partial(read_tokenizer_of, path, vocab_size=model.vocab_size)
        grammars = GrammarFactory(read, vocab_size=model.vocab_size, eos_token_ids=model.eos_token_ids)
        grammars.prepare()  # else the first request that asks for one would hold up all that is served
        return grammars

    def _join(self, roster: Roster) -> Membership | None:
        """Connects with the other ranks of the replica; None where there are none."""
        if len(roster.parts) == 1:
            return None
        if self._listener is None:
            raise InvalidRequest(
                field="members",
                value=len(roster.parts),
                problem="are several ranks, and this worker does not listen for others",
                fix="Send none.",
            )
        self._enter(pb.LOAD_PHASE_CONNECT)
        return Membership.join(self._listener, roster, epoch=self._request.epoch, go_on=self._go_on)

    def _load(self, checked: CheckedLoad, membership: Membership | None, grammars: GrammarFactory | None) -> Loaded:
        """Loads weights and cache, and starts what computes with them."""
        weights = self._read_weights(checked)
        cache = self._allocate_cache(checked)
        self._enter(pb.LOAD_PHASE_COMPILE)
        self._offloading = open_offloading(self._request, checked, self._go_on)
        kv_side = open_kv_side(
            self._request,
            checked,
            self._device,
            cache,
            listener=self._listener,
            membership=membership,
            elsewhere=None if self._offloading is None else self._offloading.storing(cache),
        )
        try:
            loaded = self._start(checked, weights, cache, membership, grammars, kv_side)
            if self._offloading is None:
                return loaded
            return replace(loaded, offloading=self._offloading, whereabouts=self._offloading.whereabouts)
        except BaseException:
            if kv_side is not None:
                kv_side.stop()
            if self._offloading is not None:
                self._offloading.close()
            raise

    def _start(
        self,
        checked: CheckedLoad,
        weights: dict[str, Tensor],
        cache: KVCache,
        membership: Membership | None,
        grammars: GrammarFactory | None,
        kv_side: KvSide | None,
    ) -> Loaded:
        """Measures and warms up, and builds the engine or the follower."""
        sharing = self._sharing(checked, membership)
        followers = membership.followers() if membership is not None and checked.leads else None
        runner = self._runner(checked, weights, cache, membership, followers, sharing, kv_side)
        executor = executing_thread(self._device, num_threads(checked))
        if membership is not None:
            self._get_ready(checked.limits, membership, runner, sharing, executor)
            self._enter(pb.LOAD_PHASE_WARM_UP)
        kv_bytes = kv_cache_bytes(cache)
        if membership is not None and followers is None:
            follower = self._follower(checked, membership, runner, executor)
            return Loaded(
                follower=follower,
                membership=membership,
                weight_bytes=self.loaded_bytes,
                kv_bytes=kv_bytes,
                kv_side=kv_side,
            )
        return self._lead(
            checked,
            runner,
            executor,
            followers,
            Loaded(
                grammars=grammars,
                membership=membership,
                weight_bytes=self.loaded_bytes,
                kv_bytes=kv_bytes,
                kv_side=kv_side,
            ),
        )

    def _lead(
        self,
        checked: CheckedLoad,
        runner: ModelRunner,
        executor: ThreadPoolExecutor,
        followers: Followers | None,
        loaded: Loaded,
    ) -> Loaded:
        """Warms the whole replica up, and builds the engine of its leader."""
        leading: Runner = runner
        membership = loaded.membership
        if membership is not None and followers is not None:
            leading = membership.leading(runner, followers, self._device.torch_device)
        budget = self._warm_up(checked, leading, executor)
        # What other ranks and attention workers do cannot be part of a graph.
        if membership is None and self._offloading is None:
            self._capture(runner, executor)
        engine = build_engine(
            leading,
            executor,
            request=self._request,
            model=checked.model,
            num_stages=len(checked.roster.stages),
            token_budget=budget.token_budget,
            residency=checked.residency,
            held=None if self._offloading is None else self._offloading.held(),
        )
        return replace(loaded, engine=engine, budget=budget)

    def _warm_up(self, checked: CheckedLoad, leading: Runner, executor: ThreadPoolExecutor) -> StepBudget:
        """Runs the first steps of the whole replica, and chooses the token budget by what they took."""
        blocks = None
        if self._offloading is not None:
            limits = checked.limits
            blocks = self._offloading.make_room(-(-(limits.token_budget + 1) // limits.block_size))
        warm = partial(warm_up, leading, model=checked.model, request=self._request, given_up=blocks)
        times = executor.submit(warm).result()
        self._enter(pb.LOAD_PHASE_WARM_UP)  # the first steps have compiled what was not there yet
        budget = budget_of(checked.limits, times)
        if isinstance(leading, PatientRunner):
            floor_s = self._request.stall_timeout_s or STALL_TIMEOUT_S
            leading.patience = Patience(floor_s=floor_s, expected_s=budget.expected_s)
        log_budget(budget)
        return budget

    def _warn_of_slow_weights(self, checked: CheckedLoad) -> None:
        """Says so where weights of fewer bits save memory alone and cost time."""
        if checked.linear is None:
            return
        bits = checked.linear.bits
        cause = why_rounded_is_slow(self._device.torch_device, TORCH_DTYPES[checked.dtype])
        if cause is None:
            return
        unquantized = (
            "serve it unquantized" if checked.linear.gptq is None else "use a checkpoint that is not quantized"
        )
        fix = "set model.dtype to bfloat16" if self._device.torch_device.type == "cpu" else unquantized
        words = "Weights of %d bits decode far slower here than bfloat16: %s. If you can, %s."
        logger.warning(words, bits, cause, fix, extra=said("slow_quantization", bits=bits, cause=cause, fix=fix))

    def _runner(
        self,
        checked: CheckedLoad,
        weights: dict[str, Tensor],
        cache: KVCache,
        membership: Membership | None,
        followers: Followers | None,
        sharing: SequenceSharing | None,
        kv_side: KvSide | None,
    ) -> ModelRunner:
        return ModelRunner(
            model=checked.model,
            weights=weights,
            cache=cache,
            device=self._device.torch_device,
            kernels=self._kernels,
            part=checked.roster.part,
            group=None if membership is None else membership.group,
            team=followers,
            sharing=sharing,
            shipper=None if kv_side is None else kv_side.rank,
            offload=self._offloading,
        )

    def _read_weights(self, checked: CheckedLoad) -> dict[str, Tensor]:
        self._warn_of_slow_weights(checked)
        slices = shard_tensors(checked.model, checked.roster.part)
        dtype, device = TORCH_DTYPES[checked.dtype], self._device.torch_device
        return load_weights(Path(self._request.model_path), slices, dtype, device, self._progress, checked.linear)

    def _allocate_cache(self, checked: CheckedLoad) -> KVCache:
        self._enter(pb.LOAD_PHASE_KV_CACHE)
        part = checked.roster.part
        return allocate_kv_cache(
            checked.model,
            num_slots=num_slots(self._request, part, checked.residency),
            one_for_all=checked.residency is not None and not checked.residency.num_local_blocks,
            dtype=TORCH_DTYPES[checked.dtype],
            device=self._device,
            layers=part.layers,
            kv_heads=part.kv_heads,
        )

    def _sharing(self, checked: CheckedLoad, membership: Membership | None) -> SequenceSharing | None:
        """Prepares to share sequences with the other ranks of the stage, where they do."""
        if membership is None:
            return None
        device, dtype = self._device.torch_device, TORCH_DTYPES[checked.dtype]
        token_budget = checked.limits.token_budget
        return membership.sharing(checked.model, self._kernels, dtype, device, token_budget=token_budget)

    def _get_ready(
        self,
        limits: ReplicaLimits,
        membership: Membership,
        runner: ModelRunner,
        sharing: SequenceSharing | None,
        executor: ThreadPoolExecutor,
    ) -> None:
        """Waits for the other ranks, and measures with them. Everything runs on the thread that executes steps."""
        executor.submit(membership.get_ready, self._go_on, self._device.torch_device, self._enter).result()
        executor.submit(
            membership.measure_runner,
            runner,
            sharing,
            token_budget=limits.token_budget,
            num_slots=self._request.num_blocks * limits.block_size,
            go_on=self._go_on,
            enter=self._enter,
        ).result()

    def _capture(self, runner: ModelRunner, executor: ThreadPoolExecutor) -> None:
        """Records steps of decodes, where the device can replay them."""
        capture = capture_for(self._device.torch_device, self._kernels)
        if capture is not None:
            executor.submit(capture_decodes, runner, self._request, capture).result()

    def _follower(
        self, checked: CheckedLoad, membership: Membership, runner: ModelRunner, executor: ThreadPoolExecutor
    ) -> Follower:
        return membership.follower(
            runner,
            executor,
            device=self._device.torch_device,
            vocab_size=checked.model.vocab_size,
            slot_limit=self._request.num_blocks * self._request.block_size,
        )

    def _progress(self, loaded_bytes: int, total_bytes: int) -> None:
        self.loaded_bytes, self.total_bytes = loaded_bytes, total_bytes
        self._go_on()  # a large model takes minutes, which nobody who ends this process waits for
