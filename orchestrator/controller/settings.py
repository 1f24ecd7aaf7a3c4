"""Owns what the controller is told at its start: the plan, and how ranks load it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from placement.planning.attention import GROUP
from placement.planning.memory import CPU_PROCESS_BYTES
from placement.planning.plan import Plan, Replica, Shard
from placement.serving.kv.peers import KvFormat
from protos.codec.formats import dtype_message, quantization_message
from protos.codec.limits import set_limits
from protos.codec.parts import shard_message
from protos.codec.replica_ranks import kv_format_message
from protos.codec.residency import residency_message
from protos.heterodyne.worker.v1 import worker_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentSettings:
    """Holds the plan, and says where and for how long its ranks load the model.

    Attributes:
        model_path: the model's directory, on every node.
        load_timeout_s: how long a rank may take to load.
        fingerprint: the digest of every file of the model, by its name; empty: ranks do not compare theirs.
        stall_timeout_s: what the gateway allows every step; 0: it is not said.
        kv_format: how replicas have keys and values sent to them.
        q_first: whether queries go to attention workers ahead of keys and values.
        staggered: whether steps of several sequences are computed in two halves where attention workers attend.
        offloading: what was decided about attention workers, in words, for people.
    """

    plan: Plan
    model_path: str
    load_timeout_s: float
    fingerprint: Mapping[str, bytes] = field(default_factory=dict)
    stall_timeout_s: float = 0.0
    kv_format: KvFormat = KvFormat.NATIVE
    q_first: bool = True
    staggered: bool = True
    offloading: str = ""

    def needed_bytes(self, shard: Shard) -> int:
        """Returns all that the rank's process takes on a CPU node: weights, KV blocks, workspace, and itself."""
        return shard.weight_bytes + shard.kv_bytes + shard.workspace_bytes + CPU_PROCESS_BYTES

    @property
    def shards(self) -> dict[tuple[str, int], Shard]:
        """Lists all ranks, those of the attention workers last, by their group and number."""
        groups = [(replica.name, replica.shards) for replica in self.plan.replicas] + [(GROUP, self.plan.attention)]
        return {(name, shard.rank): shard for name, shards in groups for shard in shards}

    def speed_request(self, replica: str, *, epoch: int) -> worker_pb2.MeasureSpeedRequest:
        """Writes what a rank is asked to measure: products with weights as they will be held."""
        # An attention worker has no weights; those of the model tell how fast its memory is.
        planned = self.plan.replicas[0] if replica == GROUP else self._planned(replica)
        return worker_pb2.MeasureSpeedRequest(
            epoch=epoch,
            dtype=dtype_message(planned.dtype),
            quantization=quantization_message(planned.limits.quantization),
        )

    def load_request(
        self, replica: str, shard: Shard, *, epoch: int, members: Sequence[worker_pb2.Member] = (), token: bytes = b""
    ) -> worker_pb2.LoadRequest:
        """Writes what a rank is asked to load, with the ``members`` of its replica, which share ``token``."""
        planned = self._planned(replica)
        request = worker_pb2.LoadRequest(
            epoch=epoch,
            model_path=self.model_path,
            dtype=dtype_message(planned.dtype),
            shard=shard_message(shard.rank, shard.part),
            num_blocks=shard.num_blocks if planned.residency is None else planned.num_blocks,
            max_context_tokens=self.plan.model.max_context_tokens,
            members=members,
            token=token if members else b"",
            stall_timeout_s=self.stall_timeout_s,
            kv_format=kv_format_message(self.kv_format),
            facts=worker_pb2.ModelFacts(
                eos_token_ids=self.plan.model.eos_token_ids,
                tied_embeddings=self.plan.model.tied_embeddings,
                fingerprint=self.fingerprint,
            ),
        )
        set_limits(request, planned.limits)
        return request

    def attention_request(self, shard: Shard, *, epoch: int, secret: bytes) -> worker_pb2.LoadRequest:
        """Writes what an attention worker is asked to set aside; model ranks know its ``secret``."""
        dtypes = {replica.dtype: None for replica in self.plan.replicas if replica.residency is not None}
        load = worker_pb2.AttentionLoad(
            kv_cache_bytes=shard.kv_bytes,
            secret=secret,
            dtypes=map(dtype_message, dtypes),
            head_dim=self.plan.model.head_dim,
        )
        return worker_pb2.LoadRequest(epoch=epoch, attention=load)

    def add_residency(
        self,
        request: worker_pb2.LoadRequest,
        replica: str,
        workers: Sequence[worker_pb2.AttentionWorker],
        secret: bytes,
    ) -> None:
        """Writes where the keys and values of a replica are, where attention workers hold some."""
        residency = self._planned(replica).residency
        if residency is None:
            return
        message = residency_message(residency, workers)
        message.q_first, message.staggered = self.q_first, self.staggered
        message.secret, message.replica = secret, replica
        request.residency.CopyFrom(message)

    def _planned(self, name: str) -> Replica:
        return next(replica for replica in self.plan.replicas if replica.name == name)
