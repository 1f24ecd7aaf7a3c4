"""Checks a load before any weight is read: the model's configuration, the request's sizes, the memory there is."""

from dataclasses import dataclass, replace
from pathlib import Path

from placement.errors import InvalidRequest, NotEnoughMemory
from placement.model.checkpoint_files import MAX_CONFIG_BYTES
from placement.model.hf import read_model_spec
from placement.model.quantization import LinearFormat, Quantization, check_linear_format, linear_format
from placement.model.specs import DType, ModelSpec
from placement.model.weights import shard_tensors
from placement.planning.limits import ReplicaLimits
from placement.planning.memory import Footprint, footprint, format_bytes, kv_bytes_per_block, rounded_size, size_words
from placement.planning.residency import Residency
from protos.codec.formats import read_dtype
from protos.codec.limits import read_limits
from protos.codec.residency import read_residency
from protos.heterodyne.worker.v1 import worker_pb2 as pb
from workers.host.device import Device
from workers.host.model_files import exists, read_json
from workers.replica.roster import Roster, read_roster
from workers.startup.same_files import check_same_descriptions, check_same_weights

_CONFIG = "config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedLoad:
    """A load that may begin.

    Attributes:
        model: the model, as its directory describes it.
        roster: the ranks of the replica, and this rank's part.
        dtype: the number type of weights, activations and KV.
        linear: the format of linear layers; None: they are held in ``dtype``.
        need: the bytes that this process has yet to allocate.
        limits: the sizes that the replica serves within.
        residency: where the keys and values are; None: at the replica's own ranks.
    """

    model: ModelSpec
    roster: Roster
    dtype: DType
    linear: LinearFormat | None
    need: Footprint
    limits: ReplicaLimits
    residency: Residency | None = None

    @property
    def leads(self) -> bool:
        """Tells whether this rank is the leader."""
        return self.roster.rank == 0


def check_load(request: pb.LoadRequest, device: Device) -> CheckedLoad:
    """Checks the model's files, the request's sizes, the cut, and the memory of the device.

    Raises:
        InvalidModel: the model's configuration is missing, damaged, or of a kind that is not served; or a file that
            this rank uses is not the one that the orchestrator has read.
        InvalidRequest: the request asks for something impossible.
        NotEnoughMemory: the device has not the memory.
    """
    path, expected = Path(request.model_path), request.facts.fingerprint
    check_same_descriptions(path, expected, tokenizer=request.shard.rank == 0)
    model = with_facts(read_model(path), request)
    dtype = read_dtype(request.dtype)
    check_request(request, model)
    limits = read_limits(request)
    roster = read_roster(request, model)
    linear = read_linear_format(path, limits.quantization)
    slices = shard_tensors(model, roster.part)
    check_linear_format(slices, linear)
    check_same_weights(path, expected, slices, linear)
    residency = check_residency(request, model, roster)
    num_blocks = request.num_blocks if residency is None else residency.num_local_blocks
    need = reckon(num_blocks, limits, model, roster, dtype, linear, on_cpu=device.torch_device.type == "cpu")
    share = kv_share(model, roster, block_size=limits.block_size)
    largest = int(need.kv_bytes / share) // max(1, num_blocks)
    check_memory(need, device.available_memory_bytes, where=device.name, kv_share=share, least_setting=largest)
    return CheckedLoad(
        model=model, roster=roster, dtype=dtype, linear=linear, need=need, limits=limits, residency=residency
    )


def check_residency(request: pb.LoadRequest, model: ModelSpec, roster: Roster) -> Residency | None:
    """Reads where the keys and values are; None: at the replica's own ranks. Raises InvalidRequest."""
    if not request.HasField("residency"):
        return None
    if roster.part.stripe is not None:
        problem, fix = "ranks that share sequences hold their own keys and values", "Send none."
        raise InvalidRequest(field="residency", problem=problem, fix=fix)
    return read_residency(request.residency, model, num_blocks=request.num_blocks, block_size=request.block_size)


def read_model(path: Path) -> ModelSpec:
    """Reads the model's specification from its directory. Raises InvalidModel."""
    config, generation = read_json(path, _CONFIG, MAX_CONFIG_BYTES), "generation_config.json"
    found = read_json(path, generation, MAX_CONFIG_BYTES) if exists(path, generation) else None
    return read_model_spec(config, found)


def with_facts(model: ModelSpec, request: pb.LoadRequest) -> ModelSpec:
    """Returns the model with what the orchestrator decided of it, which must be the same for all ranks."""
    if not request.HasField("facts"):
        return model
    facts = request.facts
    return replace(model, eos_token_ids=tuple(facts.eos_token_ids), tied_embeddings=facts.tied_embeddings)


def read_linear_format(path: Path, quantization: Quantization) -> LinearFormat | None:
    """Reads the format in which the model's linear layers are to be held.

    Raises:
        InvalidModel, InvalidConfig: see :func:`placement.model.quantization.linear_format`.
    """
    return linear_format(read_json(path, _CONFIG, MAX_CONFIG_BYTES), quantization)


def check_request(request: pb.LoadRequest, model: ModelSpec) -> None:
    """Refuses sizes that cannot work. Raises InvalidRequest."""
    for field in ("num_blocks", "max_context_tokens"):
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


def reckon(
    num_blocks: int,
    limits: ReplicaLimits,
    model: ModelSpec,
    roster: Roster,
    dtype: DType,
    linear: LinearFormat | None,
    *,
    on_cpu: bool,
) -> Footprint:
    """Reckons what this process has yet to allocate. It runs already, so its own bytes are left out."""
    block_bytes = kv_bytes_per_block(model, roster.part, dtype=dtype, block_size=limits.block_size)
    need = footprint(
        model,
        roster.part,
        num_ranks=len(roster.stages[roster.stage]),
        leads=roster.rank == 0,
        dtype=dtype,
        kv_bytes=num_blocks * block_bytes,
        limits=limits,
        on_cpu=on_cpu,
        linear=linear,
    )
    return replace(need, process_bytes=0)


def check_memory(
    need: Footprint, available_bytes: int, *, where: str, kv_share: float = 1.0, least_setting: int = 1
) -> None:
    """Refuses a load that does not fit in ``available_bytes``; the error names the setting that would help.

    Args:
        kv_share: the KV bytes of this rank over those of the rank of its replica that has most.
        least_setting: the bytes of one KV block at that rank.

    Raises:
        NotEnoughMemory: its field is ``serving.kv_cache`` where fewer KV blocks would fit, ``serving.token_budget``
            where smaller steps would, and ``model.path`` otherwise.
    """
    if need.total_bytes <= available_bytes:
        return
    setting = int((available_bytes - need.weight_bytes - need.workspace_bytes) / kv_share)
    if need.kv_bytes and setting >= max(least_setting, 1):
        field = "serving.kv_cache"
        smaller = rounded_size(setting, up=False, least=max(least_setting, 1))
        fix = f"Set serving.kv_cache to {size_words(smaller)} or less."
    elif need.weight_bytes < available_bytes:
        field = "serving.token_budget"
        fix = "Lower serving.token_budget or serving.max_num_seqs, or free memory."
    else:
        field = "model.path"
        fix = "Free memory, or use a smaller model."
    problem = f"{need} are needed, and {where} has {format_bytes(max(available_bytes, 0))} left"
    raise NotEnoughMemory(field=field, problem=problem, fix=fix)


def kv_share(model: ModelSpec, roster: Roster, *, block_size: int) -> float:
    """Returns the KV bytes of the rank over those of the rank that has most; all ranks have as many blocks."""
    dtype = DType.BFLOAT16  # any would do: the result is a ratio
    sizes = [kv_bytes_per_block(model, part, dtype=dtype, block_size=block_size) for part in roster.parts]
    return sizes[roster.rank] / max(sizes) or 1.0
