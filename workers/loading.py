"""Loading a rank: read the config, load the shard's weights, set the KV blocks aside, warm up, build the engine."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from kernels.select import kernels_for
from placement.blocks import BlockPool
from placement.errors import InvalidModel, InvalidRequest, NotEnoughMemory, cause_of
from placement.hf import read_model_spec
from placement.memory import Footprint, footprint, format_bytes, kv_bytes_per_block, size_setting
from placement.quantization import LinearFormat, Quantization, check_linear_format, linear_format
from placement.scheduling import Scheduler, SchedulerLimits
from placement.specs import DType, ModelSpec
from placement.weights import shard_tensors
from protos.heterodyne.worker.v1 import worker_pb2 as pb
from workers import wire
from workers.device import TORCH_DTYPES, Device, is_out_of_memory, use_device
from workers.engine import Engine
from workers.engine_types import Limits, Runner
from workers.followers import Follower
from workers.grammar import GrammarFactory
from workers.kv_cache import allocate_kv_cache, kv_cache_bytes
from workers.membership import Membership, Roster, read_roster
from workers.runner import ModelRunner
from workers.warm_up import capture_for, executing_thread, warm_up
from workers.weights import load_weights

_MAX_CONFIG_BYTES = 1 << 20
_QUANTIZATIONS = {
    pb.QUANTIZATION_UNSPECIFIED: Quantization.NONE,
    pb.QUANTIZATION_INT8: Quantization.INT8,
    pb.QUANTIZATION_INT4: Quantization.INT4,
}


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
        self.phase: pb.LoadPhase.ValueType = pb.LOAD_PHASE_WEIGHTS
        self.loaded_bytes = 0
        self.total_bytes = 0

    def run(self) -> Loaded:
        """Load everything.

        Raises:
            InvalidModel: the directory is missing something, damaged, or of a kind that is not served.
            InvalidRequest: the load asks for something impossible.
            NotEnoughMemory: the device has not the memory, by reckoning before anything is read or in fact.
            PeerFailed: another rank of the replica was lost.
        """
        request, device = self._request, self._device
        use_device(device.torch_device)
        model = read_model(Path(request.model_path))
        dtype = wire.dtype(request.dtype)
        _check(request, model)
        roster = read_roster(request, model)
        slices = shard_tensors(model, roster.part)
        linear = read_linear_format(request)
        check_linear_format(slices, linear)
        need = _need(request, model, roster, dtype, linear, on_cpu=device.torch_device.type == "cpu")
        check_memory(need, device.available_memory_bytes, where=device.name)
        membership = self._join(roster)
        try:
            return self._load(model, roster, TORCH_DTYPES[dtype], linear, membership)
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
        return Membership.join(self._listener, roster, epoch=self._request.epoch)

    def _load(
        self,
        model: ModelSpec,
        roster: Roster,
        dtype: torch.dtype,
        linear: LinearFormat | None,
        membership: Membership | None,
    ) -> Loaded:
        request, torch_device, part = self._request, self._device.torch_device, roster.part
        num_slots = request.num_blocks * request.block_size
        slices = shard_tensors(model, part)
        weights = load_weights(Path(request.model_path), slices, dtype, torch_device, self._progress, linear)
        self.phase = pb.LOAD_PHASE_KV_CACHE
        cache = allocate_kv_cache(
            model,
            num_slots=num_slots,
            dtype=dtype,
            device=self._device,
            layers=part.layers,
            kv_heads=part.kv_heads,
        )
        kernels = kernels_for(torch_device)
        runner = ModelRunner(
            model=model,
            weights=weights,
            cache=cache,
            device=torch_device,
            kernels=kernels,
            part=part,
            group=None if membership is None else membership.group,
            team=None if membership is None or roster.rank else membership.followers(),
        )
        self.phase = pb.LOAD_PHASE_WARM_UP
        executor = executing_thread(self._device)
        if membership is not None:
            executor.submit(membership.get_ready).result()
        kv_bytes = kv_cache_bytes(cache)
        if membership is not None and roster.rank:
            follower = membership.follower(runner, executor, vocab_size=model.vocab_size, slot_limit=num_slots)
            return Loaded(follower=follower, membership=membership, weight_bytes=self.loaded_bytes, kv_bytes=kv_bytes)
        # The kernels of several ranks' sums are no part of a graph.
        capture = capture_for(torch_device, kernels) if membership is None else None
        executor.submit(warm_up, runner, model=model, request=request, capture=capture).result()
        grammars = GrammarFactory(
            Path(request.model_path), vocab_size=model.vocab_size, eos_token_ids=model.eos_token_ids
        )
        grammars.prepare()  # reading a large tokenizer would hold up all that is served
        return Loaded(
            engine=build_engine(runner, executor, request=request, model=model),
            grammars=grammars,
            membership=membership,
            weight_bytes=self.loaded_bytes,
            kv_bytes=kv_bytes,
        )

    def _progress(self, loaded_bytes: int, total_bytes: int) -> None:
        self.loaded_bytes, self.total_bytes = loaded_bytes, total_bytes


def read_model(path: Path) -> ModelSpec:
    """The model's specification from its directory. Raises InvalidModel."""
    generation = path / "generation_config.json"
    return read_model_spec(_read_json(path / "config.json"), _read_json(generation) if generation.exists() else None)


def read_linear_format(request: pb.LoadRequest) -> LinearFormat | None:
    """How the model's linear layers are to be held.

    Raises:
        InvalidRequest: the request's quantization is not known.
        InvalidModel, InvalidConfig: see :func:`placement.quantization.linear_format`.
    """
    if request.quantization not in _QUANTIZATIONS:
        fix = "Use QUANTIZATION_UNSPECIFIED, _INT8 or _INT4."
        raise InvalidRequest(field="quantization", value=request.quantization, problem="is not known", fix=fix)
    config = _read_json(Path(request.model_path) / "config.json")
    return linear_format(config, _QUANTIZATIONS[request.quantization])


def _read_json(path: Path) -> dict[str, object]:
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise InvalidModel(
                field=path.name,
                value=path.stat().st_size,
                problem="is too large",
                fix="At most 1 MiB is read.",
            )
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidModel(
            field=path.name,
            value=str(path),
            problem=f"cannot be read ({type(error).__name__})",
            fix="Give a directory in the Hugging Face layout that this node can read.",
        ) from error
    if not isinstance(content, dict):
        raise InvalidModel(
            field=path.name, value=type(content).__name__, problem="is not an object", fix="Export it again."
        )
    return content


def _check(request: pb.LoadRequest, model: ModelSpec) -> None:
    """Refuse sizes that cannot work. Raises InvalidRequest."""
    for field in ("block_size", "num_blocks", "token_budget", "max_num_seqs", "max_context_tokens"):
        if getattr(request, field) < 1:
            raise InvalidRequest(
                field=field, value=getattr(request, field), problem="is too small", fix="Use at least 1."
            )
    if request.max_context_tokens > model.max_context_tokens:
        raise InvalidRequest(
            field="max_context_tokens",
            value=request.max_context_tokens,
            problem=f"is more than the model's own {model.max_context_tokens}",
            fix=f"Use at most {model.max_context_tokens}.",
        )


def _need(
    request: pb.LoadRequest,
    model: ModelSpec,
    roster: Roster,
    dtype: DType,
    linear: LinearFormat | None,
    *,
    on_cpu: bool,
) -> Footprint:
    """What this process has yet to allocate: it stands already, so its own bytes are left out."""
    block_bytes = kv_bytes_per_block(model, roster.part, dtype=dtype, block_size=request.block_size)
    need = footprint(
        model,
        roster.part,
        num_ranks=len(roster.parts),
        leads=roster.rank == 0,
        dtype=dtype,
        kv_bytes=request.num_blocks * block_bytes,
        max_num_seqs=request.max_num_seqs,
        token_budget=request.token_budget,
        on_cpu=on_cpu,
        linear=linear,
    )
    return replace(need, process_bytes=0)


def check_memory(need: Footprint, available_bytes: int, *, where: str) -> None:
    """Refuse what does not fit in ``available_bytes``; the error names the setting that would help.

    Raises:
        NotEnoughMemory: of ``serving.kv_cache`` where fewer KV blocks would fit, else of ``serving.token_budget``
            where smaller steps would, else of ``model.path``.
    """
    if need.total_bytes <= available_bytes:
        return
    kv_room = available_bytes - need.weight_bytes - need.workspace_bytes
    if kv_room > 0:
        field, size = "serving.kv_cache", need.kv_bytes
        fix = f"Set serving.kv_cache to {size_setting(kv_room, round_up=False)} or less."
    elif need.weight_bytes < available_bytes:
        field, size = "serving.token_budget", need.workspace_bytes
        fix = "Lower serving.token_budget or serving.max_num_seqs, or free memory."
    else:
        field, size = "model.path", need.weight_bytes
        fix = "Free memory, or use a smaller model."
    problem = f"{need} are needed, and {where} has {format_bytes(max(available_bytes, 0))} left"
    raise NotEnoughMemory(field=field, value=format_bytes(size), problem=problem, fix=fix)


def build_engine(runner: Runner, executor: ThreadPoolExecutor, *, request: pb.LoadRequest, model: ModelSpec) -> Engine:
    """The engine of a leader, not yet started."""
    pool = BlockPool(request.num_blocks, request.block_size)
    scheduler_limits = SchedulerLimits(token_budget=request.token_budget, max_num_seqs=request.max_num_seqs)
    return Engine(
        runner=runner,
        scheduler=Scheduler(pool, scheduler_limits, prefix_cache=request.prefix_cache),
        pool=pool,
        executor=executor,
        limits=Limits(
            max_context_tokens=request.max_context_tokens,
            vocab_size=model.vocab_size,
            block_size=request.block_size,
        ),
    )
