"""Owns the checks before any process starts, so that a mistake costs a second and not a failed launch.

Whether a GPU that was asked for exists is checked by the worker on its node.
"""

import errno
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

from orchestrator.config.document import Config, WorkerConfig
from orchestrator.config.parallelism import ParallelismConfig, StageConfig
from orchestrator.config.types import Address
from orchestrator.launcher.node import available_memory_bytes
from orchestrator.model_dir.files import ModelFiles, read_model_files
from placement.errors import InvalidConfig
from placement.measured.speed import DeviceSpeed
from placement.model.hf import saved_dtype
from placement.model.quantization import Quantization, linear_format
from placement.model.specs import ClusterSpec, DeviceSpec, DType, ModelSpec, NodeSpec
from placement.model.weights import num_parameters
from placement.planning.auto import Choice, Layouts, SplitBy, first_that_fits
from placement.planning.layout import ReplicaLayout, StageLayout
from placement.planning.plan import Plan
from placement.planning.planner import plan_replicas

LOCAL_NODE = "local"
_PORTS_TRIED = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What this machine has to give."""

    memory_bytes: int
    num_cores: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """A configuration that can be launched.

    Attributes:
        model: as the checkpoint describes it; ``plan.model`` has the context length that is served.
        plan: in a cluster that is not local its nodes are placeholders, ``node-i`` for worker i, until Ray has chosen.
        workers: the place in ``config.cluster.each_worker`` of every rank, by the replica's name and the rank.
        split_by: what the shares of workers are by; None: they are as asked for, or each worker has all of the model.
        machine: what this machine had to give.
        checkpoint_bytes: size of the safetensors files.
    """

    config: Config
    model: ModelSpec
    plan: Plan
    workers: Mapping[tuple[str, int], int]
    split_by: SplitBy | None
    machine: Machine
    num_parameters: int
    checkpoint_bytes: int


def preflight(
    config: Config,
    *,
    machine: Machine | None = None,
    listens: bool = True,
    speeds: Sequence[DeviceSpeed] | None = None,
) -> Checked:
    """Everything that can be checked without starting anything. Reads headers, no weights.

    Args:
        machine: what this machine has; measured when None.
        listens: whether servers are to listen here now, so that ports must be free.
        speeds: of all workers, in their order, where they were measured.

    Raises:
        InvalidConfig: a value cannot work here: no such directory, a port in use.
        InvalidModel: the model directory is not sound.
        NotEnoughMemory: a rank does not fit where it is put.
    """
    _check_environment()
    files = read_model_files(Path(config.model.path))
    machine = machine or measure_machine()
    choice = _choose(config, files, machine, speeds)
    if listens:
        _check_listening(config)
    return Checked(
        config=config,
        model=files.spec,
        plan=choice.plan,
        workers={
            (replica.name, rank): device
            for replica, layout in zip(choice.plan.replicas, choice.layouts, strict=True)
            for rank, device in enumerate(layout.devices)
        },
        split_by=choice.split_by,
        machine=machine,
        num_parameters=num_parameters(files.spec),
        checkpoint_bytes=files.checkpoint_bytes,
    )


def by_speed(checked: Checked, speeds: Sequence[DeviceSpeed]) -> Checked:
    """The same configuration on the same machine, once its workers, which run by now, were measured.

    Raises:
        InvalidConfig, InvalidModel, NotEnoughMemory: the model directory was changed in between.
    """
    return preflight(checked.config, machine=checked.machine, listens=False, speeds=speeds)


def _choose(config: Config, files: ModelFiles, machine: Machine, speeds: Sequence[DeviceSpeed] | None) -> Choice:
    """The layouts that are asked for, or those that suit, and their plan."""
    cluster, unmeasured = _cluster(config, machine)
    make_plan = partial(
        plan_replicas,
        files.spec,
        cluster,
        dtype=saved_dtype(files.config) if config.model.dtype == "auto" else DType(config.model.dtype),
        block_size=config.serving.block_size,
        kv_cache_bytes=config.serving.kv_cache,
        max_context_tokens=config.model.max_context_tokens,
        max_num_seqs=config.serving.max_num_seqs,
        token_budget=config.serving.token_budget,
        linear=linear_format(files.config, Quantization(config.model.quantization)),
    )

    def plan(layouts: Layouts) -> Plan:
        return make_plan(layouts=layouts, unmeasured=unmeasured)

    def draft(layouts: Layouts) -> Plan:
        every = {(node.name, device.name) for node in cluster.nodes for device in node.devices}
        return make_plan(layouts=layouts, unmeasured=every)

    if config.serving.parallelism is None:
        return first_that_fits(cluster, plan, draft=draft, unmeasured=unmeasured, speeds=speeds)
    layouts = _layouts(config, config.serving.parallelism)
    return Choice(layouts=layouts, plan=plan(layouts))


def measure_machine() -> Machine:
    """Memory that is free now, within the container's limit, and the cores this process may use."""
    return Machine(memory_bytes=available_memory_bytes(), num_cores=len(os.sched_getaffinity(0)))


def _layouts(config: Config, parallelism: ParallelismConfig) -> tuple[ReplicaLayout, ...]:
    """The replicas as they are asked for. Workers and the cluster's devices are in the same order."""
    places = {name: place for place, name in enumerate(config.cluster.worker_names)}
    return tuple(
        ReplicaLayout(stages=tuple(_stage_layout(stage, places) for stage in replica.stages))
        for replica in parallelism.replicas
    )


def _stage_layout(stage: StageConfig, places: Mapping[str, int]) -> StageLayout:
    return StageLayout(
        devices=tuple(places[name] for name in stage.workers),
        weights=stage.sequence_split or stage.tensor_split or (1.0,) * len(stage.workers),
        split="tensor" if stage.sequence_split is None else "sequence",
        num_layers=stage.layers,
    )


def _cluster(config: Config, machine: Machine) -> tuple[ClusterSpec, set[tuple[str, str]]]:
    """The cluster as far as it is known, and the (node, device) pairs whose memory is not."""
    workers = config.cluster.each_worker
    host = config.cluster.bind_host
    num_cpu = sum(worker.device == "cpu" for worker in workers)
    threads = max(1, machine.num_cores // max(1, num_cpu))
    if config.cluster.is_local:
        devices = tuple(_device(worker, machine.memory_bytes, threads) for worker in workers)
        unknown = {(LOCAL_NODE, w.device) for w in workers if w.device != "cpu" and w.memory is None}
        node = NodeSpec(name=LOCAL_NODE, host=host, memory_bytes=machine.memory_bytes, devices=devices)
        return ClusterSpec(nodes=(node,)), unknown
    nodes: list[NodeSpec] = []
    unknown = set()
    for index, worker in enumerate(workers):
        device = _device(worker, worker.memory or 0, 1)
        name = f"node-{index}"
        nodes.append(NodeSpec(name=name, host=host, memory_bytes=device.memory_bytes, devices=(device,)))
        if worker.memory is None:
            unknown.add((name, worker.device))
    return ClusterSpec(nodes=tuple(nodes)), unknown


def _device(worker: WorkerConfig, memory_bytes: int, num_threads: int) -> DeviceSpec:
    kind, _, index = worker.device.partition(":")
    return DeviceSpec(
        kind="cuda" if kind == "cuda" else "cpu",
        index=int(index or 0),
        memory_bytes=worker.memory or memory_bytes,
        num_threads=worker.threads or num_threads,
    )


def _check_environment() -> None:
    """Another distribution that brings a top-level package ``kernels`` would shadow ours, or be shadowed."""
    try:
        version = metadata.version("kernels")
    except metadata.PackageNotFoundError:
        return
    raise InvalidConfig(
        field="Python environment",
        value=f"kernels {version}",
        problem="has the distribution 'kernels', whose package has the name of one of Heterodyne's",
        fix="Run: python -m pip uninstall kernels",
    )


def _check_listening(config: Config) -> None:
    _check_port("gateway.address", config.gateway.address)
    if config.cluster.is_local:
        _check_bind_host(config.cluster.bind_host)
    if config.telemetry.prometheus_address is not None:
        _check_port("telemetry.prometheus_address", config.telemetry.prometheus_address)


def _check_port(field: str, address: Address) -> None:
    """Raises InvalidConfig where a server could not listen on ``address``."""
    error = _bind_error(address)
    if error is None:
        return
    if error.errno == errno.EADDRINUSE:
        free = _free_address(address)
        other = f"another port, such as {free}" if free else "another port"
        problem, fix = "is in use by another process", f"Stop that process, or set {field} to {other}."
    elif error.errno == errno.EACCES:
        problem, fix = "needs rights that this process lacks", f"Set {field} to a port of 1024 or above."
    else:
        problem = "is not an address of this machine"
        fix = f"Set {field} to 127.0.0.1:{address.port}, or to 0.0.0.0:{address.port} for all interfaces."
    raise InvalidConfig(field=field, value=str(address), problem=problem, fix=fix)


def _check_bind_host(host: str) -> None:
    """Raises InvalidConfig where workers of this machine could not listen on ``host``."""
    if _bind_error(Address(host, 0)) is not None:
        raise InvalidConfig(
            field="cluster.bind_host",
            value=host,
            problem="is not an address of this machine",
            fix="Set it to 127.0.0.1, or to an address that this machine has.",
        )


def _free_address(address: Address) -> Address | None:
    """The next free port after the one in use."""
    ports = range(address.port + 1, min(address.port + _PORTS_TRIED, 65536))
    candidates = (Address(address.host, port) for port in ports)
    return next((candidate for candidate in candidates if _bind_error(candidate) is None), None)


def _bind_error(address: Address) -> OSError | None:
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            # As servers do: a port whose last connections are still in TIME_WAIT counts as free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
    except OSError as error:
        return error
    return None
