"""Clusters with little memory, layouts of every kind for them, and the advice of a refusal, read from its words."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from hypothesis import strategies as st

from orchestrator.config.types import parse_bytes
from placement.errors import NotEnoughMemory
from placement.model.specs import ClusterSpec, DeviceSpec, DType, ModelSpec, NodeSpec, RopeSpec
from placement.planning.layout import ReplicaLayout, StageLayout, one_each
from placement.planning.limits import ReplicaLimits
from placement.planning.memory import CPU_PROCESS_BYTES
from placement.planning.plan import Role
from placement.planning.pools import EVERYONE, Pool

MIB = 2**20
# A token takes 8 KiB of KV, and the weights about 11 MiB.
MODEL = ModelSpec(
    architecture="llama",
    num_layers=4,
    hidden_size=256,
    num_heads=4,
    num_kv_heads=4,
    head_dim=64,
    ffn_size=512,
    vocab_size=1000,
    max_context_tokens=4096,
    rms_norm_eps=1e-5,
    rope=RopeSpec(),
    tied_embeddings=True,
)
POOLS = (
    EVERYONE,
    Pool(role=Role.PREFILL, block_size=24, dtype=DType.BFLOAT16),
    Pool(role=Role.DECODE, block_size=7),
)
_SIZE = r"(\d+ (?:B|KiB|MiB|GiB))"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is to be planned. Devices are told apart by the names of their workers."""

    cluster: ClusterSpec
    layouts: tuple[ReplicaLayout, ...] | None
    kv_cache_bytes: int | None
    max_context_tokens: int | None
    limits: ReplicaLimits

    def arguments(self) -> dict[str, Any]:
        """Returns all but the cluster and the layouts, as a planner takes them."""
        return {
            "dtype": DType.FLOAT32,
            "kv_cache_bytes": self.kv_cache_bytes,
            "max_context_tokens": self.max_context_tokens,
            "limits": self.limits,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """One of the ways that a fix names."""

    kv_cache_bytes: int | None = None
    max_context_tokens: int | None = None
    worker_bytes: Mapping[str, int] = field(default_factory=dict)
    free_bytes: Mapping[str, int] = field(default_factory=dict)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Draws one to three nodes of one or two devices. The memory of either may be known."""
    nodes = []
    for name in "abc"[: draw(st.integers(1, 3))]:
        num_devices = draw(st.integers(1, 2))
        own = draw(st.none() | memories(num_devices))
        devices = [draw(_devices(name, index, own)) for index in range(num_devices)]
        nodes.append(NodeSpec(name=name, memory_bytes=own, devices=tuple(devices)))
    cluster = ClusterSpec(nodes=tuple(nodes))
    return Case(
        cluster=cluster,
        layouts=draw(st.sampled_from([one_each(cluster)]) | layouts(sum(len(node.devices) for node in nodes))),
        kv_cache_bytes=draw(st.none() | st.sampled_from([1, 100_000, MIB, 5 * MIB, 20 * MIB, 40 * MIB, 80 * MIB])),
        max_context_tokens=draw(st.none() | st.sampled_from([1, 100, 1000, 4096])),
        limits=ReplicaLimits(block_size=draw(st.sampled_from([1, 3, 16, 100])), token_budget=64, max_num_seqs=4),
    )


def memories(num_processes: int = 1) -> st.SearchStrategy[int]:
    """Draws memory in which so many processes fit, or do not, beside a small model."""
    return st.sampled_from(range(-20, 121, 7)).map(lambda size: num_processes * (CPU_PROCESS_BYTES + size * MIB))


@st.composite
def _devices(draw: st.DrawFn, node: str, index: int, of_node: int | None) -> DeviceSpec:
    said = draw(st.none() | memories())
    worker = f"{node}{index}"
    if draw(st.booleans()):
        of_gpu = None if said is None else said + 400 * MIB
        return DeviceSpec(kind="cuda", index=index, memory_bytes=of_gpu, worker=worker)
    return DeviceSpec(kind="cpu", memory_bytes=said or of_node, worker=worker)


@st.composite
def layouts(draw: st.DrawFn, num_devices: int) -> tuple[ReplicaLayout, ...]:
    """Draws replicas over all devices, in pools or in none, whose ranks share layers, sequences or neither."""
    replicas = []
    first = 0
    while first < num_devices:
        devices = tuple(range(first, draw(st.integers(first + 1, num_devices))))
        first = devices[-1] + 1
        kind = draw(st.sampled_from(["tensor", "sequence", "stages"]))
        weights = tuple(draw(st.sampled_from([1.0, 2.0, 3.0])) for _ in devices)
        if kind == "stages" or len(devices) > 3:
            devices = devices[:4]
            first = devices[-1] + 1
            stages = tuple(StageLayout(devices=(device,), weights=(1.0,)) for device in devices)
        elif kind == "sequence":
            stages = (StageLayout(devices=devices, weights=weights, split="sequence"),)
        else:
            stages = (StageLayout(devices=devices, weights=weights),)
        replicas.append(ReplicaLayout(stages=stages, pool=draw(st.sampled_from(POOLS))))
    return tuple(replicas)


def advice(error: NotEnoughMemory) -> list[Advice]:
    """Reads the ways with a size or a number from the words of a refusal."""
    ways = re.split(r", or |, ", error.fix.removesuffix("."))
    return [read for read in map(_read, ways) if read != Advice()]


def _read(way: str) -> Advice:
    def size(pattern: str) -> int | None:
        found = re.search(pattern, way, re.IGNORECASE)
        return None if found is None else int(str(parse_bytes(found[1])))

    context = re.search(r"set model\.max_context_tokens to (\d+) or less", way, re.IGNORECASE)
    given = re.findall(rf"(each worker|worker \w+) {_SIZE} or more", way, re.IGNORECASE)
    freed = re.findall(rf"(?:free|and) {_SIZE} on node (\w)", way, re.IGNORECASE)
    return Advice(
        kv_cache_bytes=size(rf"set serving\.kv_cache to {_SIZE} or (?:more|less)"),
        max_context_tokens=int(context[1]) if context else None,
        worker_bytes={who: int(str(parse_bytes(text))) for who, text in given},
        free_bytes={node: int(str(parse_bytes(text))) for text, node in freed},
    )


def follow(case: Case, way: Advice) -> Case:
    """Returns the case once somebody did what they were told."""
    nodes = tuple(_freed(node, way) for node in case.cluster.nodes)
    return replace(
        case,
        cluster=ClusterSpec(nodes=nodes),
        kv_cache_bytes=case.kv_cache_bytes if way.kv_cache_bytes is None else way.kv_cache_bytes,
        max_context_tokens=way.max_context_tokens or case.max_context_tokens,
    )


def _freed(node: NodeSpec, way: Advice) -> NodeSpec:
    memory = None if node.memory_bytes is None else node.memory_bytes + way.free_bytes.get(node.name, 0)
    devices = []
    for device in node.devices:
        own = device.memory_bytes
        if device.kind == "cpu" and own == node.memory_bytes:  # it is not said, so it is the node's
            devices.append(replace(device, memory_bytes=memory))
            continue
        asked = [way.worker_bytes.get(who, 0) for who in ("each worker", f"worker {device.worker}")]
        devices.append(replace(device, memory_bytes=max(own or 0, *asked) or None))
    return replace(node, memory_bytes=memory, devices=tuple(devices))
