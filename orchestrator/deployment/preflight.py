"""Checks a configuration before any process starts, so that a mistake costs a second and not a failed launch.

Which GPUs a machine has is checked by the worker on its node; here only whether this one has any.
"""

import errno
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path

from orchestrator.config.document import Config
from orchestrator.config.limits import replica_limits
from orchestrator.config.parallelism import ParallelismConfig, StageConfig
from orchestrator.config.pools import pool_of_each, replica_pool
from orchestrator.config.types import Address
from orchestrator.deployment.known_cluster import KnownCluster, Machine, known_clusters, measure_machine
from orchestrator.deployment.offloading import Offloading, decide
from orchestrator.errors import refuse
from orchestrator.model_dir.files import ModelFiles, read_model_files
from orchestrator.model_dir.fingerprint import read_fingerprint
from placement.errors import HeterodyneError, InvalidConfig
from placement.measured.speed import DeviceSpeed
from placement.measured.targets import TARGET_VARIABLE
from placement.model.hf import saved_dtype
from placement.model.quantization import Quantization, linear_format
from placement.model.specs import DType, ModelSpec
from placement.model.weights import num_parameters
from placement.planning.attention import GROUP, AttentionSetup
from placement.planning.auto import Choice, MakePlan, SplitBy, choose_layouts
from placement.planning.layout import ReplicaLayout, StageLayout
from placement.planning.plan import Plan, Shard
from placement.planning.planner import plan_replicas
from placement.planning.seating import Host
from placement.serving.kv.pairing import check_exchange

IN_USE = "is in use by another process"
_PORTS_TRIED = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """A configuration that can be launched.

    Attributes:
        model: describes the checkpoint; ``plan.model`` has the context length that is served.
        plan: where the workers' machines are not known its nodes are placeholders, such as ``node-0``.
        workers: place in ``config.cluster.each_worker`` of every rank, by the replica's name and the rank.
        split_by: what the shares of workers are by; None: they are as asked for, or each worker has all of the model.
        machine: what this machine had to give.
        hosts: the machine of each worker in a cluster that was joined; None where that is not known.
        checkpoint_bytes: size of the safetensors files.
        fingerprint: the digest of every file of the model, by its name.
        warnings: what is odd about the model directory, and served all the same.
        offloading: what was decided about attention workers; None: there are none.
    """

    config: Config
    model: ModelSpec
    plan: Plan
    workers: Mapping[tuple[str, int], int]
    split_by: SplitBy | None
    machine: Machine
    hosts: tuple[Host, ...] | None
    checkpoint_bytes: int
    fingerprint: Mapping[str, bytes]
    warnings: tuple[str, ...] = ()
    offloading: Offloading | None = None

    def is_placed(self, shard: Shard) -> bool:
        """Returns whether it is known where the rank will run; else its plan has a placeholder for the node."""
        cluster = self.config.cluster
        named = cluster.each_worker[cluster.worker_names.index(shard.device.worker)].node
        return cluster.is_local or self.hosts is not None or named is not None

    @property
    def trial(self) -> "Checked | None":
        """Returns what is started to be measured, before it is decided what is served; None: nothing is measured."""
        plan = None if self.offloading is None else self.offloading.trial
        if plan is None:
            return None if self.split_by is None else self
        names = self.config.cluster.worker_names
        groups = [*((each.name, each.shards) for each in plan.replicas), (GROUP, plan.attention)]
        workers = {(name, it.rank): names.index(it.device.worker) for name, shards in groups for it in shards}
        return replace(self, plan=plan, workers=workers)

    @property
    def num_parameters(self) -> int:
        """Counts the model's parameters."""
        return num_parameters(self.model)

    @property
    def context_tokens(self) -> int:
        """Returns the most tokens of prompt and answer together that are served."""
        return self.plan.model.max_context_tokens

    @property
    def model_context_tokens(self) -> int:
        """Returns the most tokens that the model was made for."""
        return self.model.max_context_tokens


def preflight(
    config: Config,
    *,
    machine: Machine | None = None,
    listens: bool = True,
    hosts: tuple[Host, ...] | None = None,
    speeds: Sequence[DeviceSpeed] | None = None,
) -> Checked:
    """Checks everything that can be checked without starting anything. Reads headers, and of the weights samples.

    Args:
        machine: what this machine has; measured when None.
        listens: whether servers are to listen here now, so that ports must be free.
        hosts: the machine of each worker in a cluster that was joined; None where that is not known.
        speeds: of all workers, in their order, where they were measured.

    Raises:
        InvalidConfig: a value cannot work here: no such directory, a port in use, more threads than cores.
        InvalidModel: the model directory is not sound.
        NotEnoughMemory: a rank does not fit where it is put.
    """
    _check_environment()
    files = read_model_files(Path(config.model.path))
    _check_machine(config, machine := machine or measure_machine())
    cluster, choice, offloading = _choose(config, files, known_clusters(config, machine, hosts), speeds)
    if listens:
        _check_start(config, machine)
    return Checked(
        config=config,
        model=files.spec,
        plan=choice.plan,
        workers=_workers(config, cluster, choice),
        split_by=choice.split_by,
        machine=machine,
        hosts=hosts,
        checkpoint_bytes=files.checkpoint_bytes,
        fingerprint=read_fingerprint(Path(config.model.path)),
        warnings=files.warnings,
        offloading=offloading,
    )


def _workers(config: Config, cluster: KnownCluster, choice: Choice) -> dict[tuple[str, int], int]:
    """Returns which worker each rank is, those of the attention workers' group among them."""
    names = config.cluster.worker_names
    attention = {(GROUP, shard.rank): names.index(shard.device.worker) for shard in choice.plan.attention}
    return attention | {
        (replica.name, rank): cluster.workers[device]
        for replica, layout in zip(choice.plan.replicas, choice.layouts, strict=True)
        for rank, device in enumerate(layout.devices)
    }


def on_hosts(checked: Checked, hosts: tuple[Host, ...]) -> Checked:
    """Checks the same configuration again, once the machines of its workers are known.

    Raises:
        InvalidConfig, InvalidModel, NotEnoughMemory: the machines cannot serve it; or the model directory was changed.
    """
    return preflight(checked.config, machine=checked.machine, listens=False, hosts=hosts)


def by_speed(checked: Checked, speeds: Sequence[DeviceSpeed]) -> Checked:
    """Checks the same configuration on the same machines again, once its workers, which run by now, were measured.

    Raises:
        InvalidConfig, InvalidModel, NotEnoughMemory: the model directory was changed in between.
    """
    return preflight(checked.config, machine=checked.machine, listens=False, hosts=checked.hosts, speeds=speeds)


def _choose(
    config: Config, files: ModelFiles, clusters: Sequence[KnownCluster], speeds: Sequence[DeviceSpeed] | None
) -> tuple[KnownCluster, Choice, Offloading | None]:
    """Returns the first cluster that a plan fits, and the plan; raises what was wrong with the first of them."""
    refusals: list[HeterodyneError] = []
    for cluster in clusters:
        try:
            computing, choice, offloading = _offloaded(config, files, cluster, speeds)
            if config.serving.disaggregation != "never" and len(choice.plan.replicas) > 1:
                check_exchange(choice.plan)
            return computing, choice, offloading
        except HeterodyneError as error:
            refusals.append(error)
    raise refusals[0]


def _offloaded(
    config: Config, files: ModelFiles, cluster: KnownCluster, speeds: Sequence[DeviceSpeed] | None
) -> tuple[KnownCluster, Choice, Offloading | None]:
    """Returns the workers of the model, their plan, and what was decided about attention workers."""
    if config.serving.attention is None:
        return cluster, _choose_layouts(config, files, cluster, speeds), None

    def plan_with(computing: KnownCluster, setup: AttentionSetup | None) -> Choice:
        return _choose_layouts(config, files, computing, speeds, setup)

    return decide(config, files.spec, _dtype(config, files), cluster, speeds, plan_with)


def _choose_layouts(
    config: Config,
    files: ModelFiles,
    cluster: KnownCluster,
    speeds: Sequence[DeviceSpeed] | None,
    attention: AttentionSetup | None = None,
) -> Choice:
    """Returns the layouts that are asked for, or those that suit, and their plan."""
    make_plan = partial(_planner(config, files), attention=attention)
    if config.serving.parallelism is None:
        device_speeds = None if speeds is None else [speeds[worker] for worker in cluster.workers]
        pools = tuple(pool_of_each(config.serving.pools, config.cluster.named_workers).values())
        device_pools = [pools[worker] for worker in cluster.workers]
        return choose_layouts(make_plan, cluster.spec, speeds=device_speeds, pools=device_pools)
    layouts = _layouts(config, config.serving.parallelism, cluster)
    return Choice(layouts=layouts, plan=make_plan(cluster.spec, layouts=layouts))


def _dtype(config: Config, files: ModelFiles) -> DType:
    return saved_dtype(files.config) if config.model.dtype == "auto" else DType(config.model.dtype)


def _planner(config: Config, files: ModelFiles) -> MakePlan:
    """Returns a function that plans layouts on a cluster as the configuration says."""
    return partial(
        plan_replicas,
        files.spec,
        dtype=_dtype(config, files),
        kv_cache_bytes=config.serving.kv_cache,
        max_context_tokens=config.model.max_context_tokens,
        limits=replica_limits(config),
        linear=linear_format(files.config, Quantization(config.model.quantization)),
    )


def _layouts(config: Config, parallelism: ParallelismConfig, cluster: KnownCluster) -> tuple[ReplicaLayout, ...]:
    """Returns the replicas as they are asked for, with the devices of ``cluster`` for the names of workers."""
    names = config.cluster.worker_names
    places = {names[worker]: device for device, worker in enumerate(cluster.workers)}
    pools = pool_of_each(config.serving.pools, config.cluster.named_workers)
    return tuple(
        ReplicaLayout(
            stages=tuple(_stage_layout(stage, places) for stage in replica.stages), pool=replica_pool(replica, pools)
        )
        for replica in parallelism.replicas
    )


def _stage_layout(stage: StageConfig, places: Mapping[str, int]) -> StageLayout:
    return StageLayout(
        devices=tuple(places[name] for name in stage.workers),
        weights=stage.sequence_split or stage.tensor_split or (1.0,) * len(stage.workers),
        split="tensor" if stage.sequence_split is None else "sequence",
        num_layers=stage.layers,
    )


def _check_environment() -> None:
    """Refuses another distribution with a top-level package ``kernels``, which would shadow ours, or be shadowed."""
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


def _check_machine(config: Config, machine: Machine) -> None:
    """Refuses what workers of this machine could not do."""
    _check_target(config, machine)
    _check_threads(config, machine)


def _check_target(config: Config, machine: Machine) -> None:
    """Refuses a CPU target that workers of this machine could not run; machines of a cluster have their own."""
    named, runnable = machine.named_target, machine.targets
    if config.cluster.is_local and named and runnable and named not in runnable:
        raise InvalidConfig(
            field=f"environment variable {TARGET_VARIABLE}",
            value=named,
            problem="is a target that this machine's CPU can't execute",
            fix=f"Set it to one of {', '.join(runnable)}, or unset it.",
        )


def _check_threads(config: Config, machine: Machine) -> None:
    """Refuses a worker of this machine with more threads than there are cores: they would only wait for each other."""
    for index, worker in enumerate(config.cluster.workers if config.cluster.is_local else ()):
        if worker.device == "cpu" and (worker.threads or 0) > machine.num_cores:
            cores = "1 core" if machine.num_cores == 1 else f"{machine.num_cores} cores"
            raise InvalidConfig(
                field=f"cluster.workers.{index}.threads",
                value=worker.threads,
                problem=f"is more than the {cores} that this machine, or the limit of its container, gives",
                fix=f"Set it to {machine.num_cores} or less, or leave it out.",
            )


def _check_start(config: Config, machine: Machine) -> None:
    """Checks what must be there where the deployment is to start here, and now."""
    _check_gpus(config, machine)
    _check_listening(config)


def _check_gpus(config: Config, machine: Machine) -> None:
    """Refuses a worker of this machine on a GPU where there is none; a plan may be for another machine."""
    for index, worker in enumerate(config.cluster.workers if config.cluster.is_local else ()):
        if worker.device != "cpu" and not machine.has_gpu:
            raise InvalidConfig(
                field=f"cluster.workers.{index}.device",
                value=worker.device,
                problem="this machine has no CUDA GPU",
                fix="Set device: cpu.",
            )


def _check_listening(config: Config) -> None:
    """Raises InvalidConfig where a server could not listen as configured; where several could not, for all of them."""
    bind_host = config.cluster.bind_host if config.cluster.is_local else None
    refusals = (
        _port_refusal("gateway.address", config.gateway.address),
        _port_refusal("gateway.http_address", config.gateway.http_address),
        None if bind_host is None else _bind_host_refusal(bind_host),
        _port_refusal("telemetry.prometheus_address", config.telemetry.prometheus_address),
    )
    refuse("the configuration", [refusal for refusal in refusals if refusal is not None])


def _port_refusal(field: str, address: Address | None) -> InvalidConfig | None:
    """Returns the error where a server could not listen on ``address``."""
    error = None if address is None else _bind_error(address)
    if address is None or error is None:
        return None
    if error.errno == errno.EADDRINUSE:
        free = free_address(address)
        other = f"another port, such as {free}" if free else "another port"
        problem, fix = IN_USE, f"Stop that process, or set {field} to {other}."
    elif error.errno == errno.EACCES:
        problem, fix = "needs rights that this process lacks", f"Set {field} to a port of 1024 or above."
    else:
        problem = "is not an address of this machine"
        fix = f"Set {field} to 127.0.0.1:{address.port}, or to 0.0.0.0:{address.port} for all interfaces."
    return InvalidConfig(field=field, value=str(address), problem=problem, fix=fix)


def _bind_host_refusal(host: str) -> InvalidConfig | None:
    """Returns the error where workers of this machine could not listen on ``host``."""
    if _bind_error(Address(host, 0)) is None:
        return None
    return InvalidConfig(
        field="cluster.bind_host",
        value=host,
        problem="is not an address of this machine",
        fix="Set it to 127.0.0.1, or to an address that this machine has.",
    )


def free_address(address: Address) -> Address | None:
    """Returns the address with the next free port after the one in use."""
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
