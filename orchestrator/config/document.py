"""Owns the cluster YAML: its sections, their defaults and ranges, and how one file becomes a :class:`Config`.

Precedence: command line, environment, file, default. The strings under the fields are the descriptions that
``schema`` prints.
"""

import dataclasses
import os
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field, TypeAdapter

from orchestrator.config.attention_checks import check_attention, model_workers
from orchestrator.config.environment import unknown_variables, variable_of, wrong_target
from orchestrator.config.parallelism import check_parallelism
from orchestrator.config.pool_checks import check_pools
from orchestrator.config.pools import NamedWorker
from orchestrator.config.serving import ServingConfig, expand_auto
from orchestrator.config.source import Layers, read_layers
from orchestrator.config.types import (
    STRICT,
    Address,
    AddressText,
    ByteSize,
    Device,
    Endpoint,
    ModelPath,
    RayAddress,
    WorkerName,
)
from orchestrator.config.violations import collect
from orchestrator.errors import refuse
from placement.errors import InvalidConfig

_DEFAULT_ADDRESS = Address("127.0.0.1", 50051)
_Name = Annotated[str, Field(min_length=1, max_length=128)]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """What is served."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    path: ModelPath
    """Directory in the Hugging Face layout, relative to this file."""
    name: _Name | None = None
    """Name that clients ask for. Default: the directory's name."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number type of weights, activations and KV. auto: the one that the model was saved in."""
    quantization: Literal["none", "int8", "int4"] = "none"
    """To what the weights of linear layers are rounded while they load: less memory, and slightly other answers.
    Decoding is faster in bfloat16, and on CPUs far slower in float32. none: as the model has them; GPTQ models are
    served so."""
    max_context_tokens: Annotated[int, Field(ge=1, le=2**27)] | None = None
    """Most tokens of prompt and answer together. Default: the model's own, or what the KV blocks hold."""

    @property
    def directory(self) -> Path:
        """Returns ``path`` as a Path, which is absolute once loaded."""
        return Path(self.path)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """One or more workers of a kind."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    name: WorkerName | None = None
    """What serving.parallelism calls it; with a count, the first is NAME-0. Default: worker-N, by its place among all
    workers, from 0."""
    device: Device = "cpu"
    """cpu, or cuda:N for a GPU of the node."""
    count: Annotated[int, Field(ge=1, le=1024)] = 1
    """How many of them."""
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """CPU threads of each. Default: the cores that `serve` may use on this machine, by its affinity and the CPU quota
    of its container (rounded down), divided by the cpu workers. On a Ray cluster that was there before, a cpu worker
    has no default."""
    memory: ByteSize | None = None
    """Memory each may use. Default: what the node has. Set it for remote workers and GPUs; otherwise each is assumed to
    hold the whole model."""
    node: Annotated[str, Field(min_length=1, max_length=253)] | None = None
    """The machine of the Ray cluster to run them on: its hostname or its address, as `ray list nodes` shows them.
    Default: any machine with room."""
    node_labels: Mapping[str, str] = field(default_factory=dict)
    """Ray node labels that a node must have to run them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """What it runs on."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    ray_address: RayAddress | None = None
    """local starts Ray here, auto finds a running one, host:port joins one. Default: RAY_ADDRESS or local."""
    bind_host: Annotated[str, Field(min_length=1, max_length=253)] | None = None
    """Address that workers and the controller listen on; 0.0.0.0 is every interface. Default: 127.0.0.1 where all
    workers are on this machine, else the address that Ray knows each node by. Between several machines every TCP port
    must be open, and what is sent is not encrypted."""
    workers: Annotated[tuple[WorkerConfig, ...], Field(min_length=1, max_length=1024)] = (WorkerConfig(),)
    """The workers: one replica each, unless serving.parallelism says otherwise."""

    @property
    def is_local(self) -> bool:
        """Whether everything runs on this machine, in a Ray cluster of its own."""
        return self.ray_address in (None, "local")

    @property
    def each_worker(self) -> tuple[WorkerConfig, ...]:
        """Returns an entry for each worker, with counts expanded."""
        return tuple(worker for worker in self.workers for _ in range(worker.count))

    @property
    def worker_names(self) -> tuple[str, ...]:
        """Returns the name of each worker, with counts expanded."""
        names: list[str] = []
        for worker in self.workers:
            for number in range(worker.count):
                several = f"-{number}" if worker.count > 1 else ""
                names.append(f"{worker.name}{several}" if worker.name else f"worker-{len(names)}")
        return tuple(names)

    @property
    def named_workers(self) -> tuple[NamedWorker, ...]:
        """Returns the names and labels of each worker, with counts expanded."""
        return tuple(
            NamedWorker(name=name, entry=worker.name, labels=worker.node_labels)
            for worker, name in zip(self.each_worker, self.worker_names, strict=True)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig:
    """The public front."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    address: AddressText = _DEFAULT_ADDRESS
    """Where clients connect by gRPC. Port 0 takes any free port."""
    http_address: Annotated[AddressText | None, Field(examples=["127.0.0.1:8000", "0.0.0.0:8000"])] = None
    """Where clients of the OpenAI API connect by HTTP, such as 127.0.0.1:8000. Default: nowhere, since neither surface
    asks who a client is, and since port 8000 is often another program's, beside which the service shall still start."""
    max_in_flight: Annotated[int, Field(ge=1, le=2**20)] = 256
    """Most answers that replicas work on at once; a request counts once for each of its choices."""
    max_queued: Annotated[int, Field(ge=0, le=2**20)] = 1024
    """Most requests that wait; further ones are refused, with RESOURCE_EXHAUSTED by gRPC and 429 by HTTP."""
    request_timeout_s: Annotated[float, Field(gt=0, le=86400)] = 600.0
    """Longest a request may take, whatever deadline its client set."""
    drain_grace_s: Annotated[float, Field(ge=0, le=86400)] = 30.0
    """How long requests may still run after the service was told to stop."""
    heartbeat_timeout_s: Annotated[float, Field(ge=1.0, le=60)] = 2.0
    """Silence after which a replica counts as failed."""
    stall_timeout_s: Annotated[float, Field(ge=1.0, le=3600)] = 30.0
    """How long a replica with running sequences may go without finishing a step before it counts as failed. A replica
    whose steps are slow may take ten times its longest step, where that is more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchConfig:
    """How long starting may take."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    start_timeout_s: Annotated[float, Field(gt=0, le=86400)] = 60.0
    """From launching a worker until it answers."""
    load_timeout_s: Annotated[float, Field(gt=0, le=86400)] = 600.0
    """From then until its weights are loaded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TelemetryConfig:
    """What is measured and where it goes. Prompt text is never recorded."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    prometheus_address: AddressText | None = None
    """Where Prometheus scrapes. Default: nowhere."""
    otlp_endpoint: Endpoint | None = None
    """OTLP gRPC receiver of traces and metrics. Default: none."""
    vllm_metrics: bool = False
    """Whether Prometheus also finds the metrics of vLLM, under vLLM's names, for the dashboards and gateways that
    know those."""
    service_name: _Name = "heterodyne"
    """service.name of everything that is reported."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """One Heterodyne deployment: a model, the machines it runs on, and how it is served."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    model: ModelConfig
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    serving: ServingConfig = field(default_factory=ServingConfig)
    gateway: GatewayConfig = field(default_factory=GatewayConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)


ADAPTER: TypeAdapter[Config] = TypeAdapter(Config)


def load_config(path: Path | str, *, overrides: Sequence[str] = (), environ: Mapping[str, str] = os.environ) -> Config:
    """Reads the configuration in ``path``, changed by the environment and by ``overrides``.

    Args:
        overrides: ``section.key=value`` each, as ``--set`` takes them; ``cluster.workers.0.device=cpu``
            reaches into a list. Values are read as YAML, and as plain text where they are none.
        environ: ``HETERODYNE_SECTION__KEY`` stands for ``section.key``; ``RAY_ADDRESS`` counts where
            ``cluster.ray_address`` is not set.

    Returns:
        A Config with an absolute ``model.path``, and with ``model.name`` and ``cluster.ray_address`` set.
        A relative path in the file starts at the file's directory, one from elsewhere at the working
        directory.

    Raises:
        InvalidConfig: the file or a value was refused; InvalidConfigs, listing all, where several were.
    """
    path = Path(path)
    layers = read_layers(path, overrides=overrides, environ=environ)
    expand_auto(layers)
    config, violations = collect(ADAPTER, Config, layers)
    errors = [*unknown_variables(environ, settings_variables()), *layers.errors, *violations]
    if (wrong := wrong_target(environ)) is not None:
        errors.append(wrong)
    if config is not None:
        errors += _contradictions(config, layers)
    refuse(str(path), errors)
    assert config is not None
    return _resolve(config, path, layers)


def settings_variables() -> list[str]:
    """Returns the environment variables that stand for a key of a section."""
    sections = typing.get_type_hints(Config)
    return [
        variable_of(section, key.name)
        for section in (section.name for section in dataclasses.fields(Config))
        for key in dataclasses.fields(sections[section])
    ]


def _resolve(config: Config, path: Path, layers: Layers) -> Config:
    base = path.parent if layers.is_from_file(("model", "path")) else Path()
    directory = (base / config.model.directory.expanduser()).resolve()
    name = config.model.name or directory.name
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, path=str(directory), name=name),
        cluster=dataclasses.replace(config.cluster, ray_address=config.cluster.ray_address or "local"),
    )


def _contradictions(config: Config, layers: Layers) -> list[InvalidConfig]:
    """Returns a refusal for each value that is fine alone but contradicts another."""
    errors = []
    serving = config.serving
    if serving.token_budget is not None and serving.token_budget < serving.max_num_seqs:
        key = ("serving", "token_budget")
        problem = f"is less than serving.max_num_seqs = {serving.max_num_seqs}, so decodes would stall"
        fix = f"Set it to {serving.max_num_seqs} or more, or lower serving.max_num_seqs."
        errors.append(layers.refusal(key, serving.token_budget, problem, fix))
    gateway, prometheus = config.gateway.address, config.telemetry.prometheus_address
    if prometheus is not None and prometheus.port == gateway.port != 0:
        problem = "has the port of gateway.address"
        key = ("telemetry", "prometheus_address")
        errors.append(layers.refusal(key, str(prometheus), problem, "Give each a port of its own."))
    http = config.gateway.http_address
    for key, other in ((("gateway", "address"), gateway), (("telemetry", "prometheus_address"), prometheus)):
        if http is not None and other is not None and http.port == other.port != 0:
            problem = f"has the port of {'.'.join(key)}"
            where = ("gateway", "http_address")
            errors.append(layers.refusal(where, str(http), problem, "Give each a port of its own."))
    if config.telemetry.vllm_metrics and prometheus is None:
        problem = "is set, and telemetry.prometheus_address is not"
        fix = "Set telemetry.prometheus_address to where Prometheus shall scrape, such as 127.0.0.1:9464."
        errors.append(layers.refusal(("telemetry", "vllm_metrics"), True, problem, fix))
    errors += _worker_contradictions(config, layers)
    workers = config.cluster.named_workers
    if wrong := check_attention(serving, workers, layers):
        return errors + wrong
    computing = model_workers(serving.attention, workers)
    return (
        errors
        + check_parallelism(serving.parallelism, [worker.name for worker in computing], layers)
        + check_pools(serving, computing, layers)
    )


def _worker_contradictions(config: Config, layers: Layers) -> list[InvalidConfig]:
    errors = []
    seen: set[str] = set()
    is_local = config.cluster.is_local
    for index, worker in enumerate(config.cluster.workers):
        where = ("cluster", "workers", index)
        if is_local and worker.device != "cpu" and (worker.count > 1 or worker.device in seen):
            problem = "is given to more than one worker of this machine"
            errors.append(layers.refusal((*where, "device"), worker.device, problem, "Give each GPU to one worker."))
        if not is_local and worker.device == "cpu" and worker.threads is None:
            problem = "is required with cluster.ray_address, as the machines are not known yet"
            fix = "Set it to the cores that each such worker shall have."
            errors.append(layers.refusal((*where, "threads"), None, problem, fix))
        if is_local and worker.node is not None:
            problem = "names a machine, and without a Ray cluster all workers run on this one"
            fix = "Set cluster.ray_address to auto, or to host:port of the head node; or leave node out."
            errors.append(layers.refusal((*where, "node"), worker.node, problem, fix))
        seen.add(worker.device)
    return errors
