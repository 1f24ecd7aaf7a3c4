"""Owns what the controller is told at its start: the plan, and how ranks load it."""

from collections.abc import Sequence
from dataclasses import dataclass

from placement.model.quantization import Quantization
from placement.planning.memory import CPU_PROCESS_BYTES
from placement.planning.plan import Plan, Shard
from protos.codec.formats import dtype_message, quantization_message
from protos.codec.parts import shard_message
from protos.heterodyne.worker.v1 import worker_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentSettings:
    """The plan, and the sizes that every rank loads with."""

    plan: Plan
    model_path: str
    token_budget: int
    max_num_seqs: int
    max_context_tokens: int
    prefix_cache: bool
    load_timeout_s: float
    quantization: Quantization = Quantization.NONE

    def needed_bytes(self, shard: Shard) -> int:
        """Returns all that a rank's process takes on a CPU node: weights, KV blocks, workspace, the process itself."""
        return shard.weight_bytes + shard.kv_bytes + shard.workspace_bytes + CPU_PROCESS_BYTES

    def speed_request(self, *, epoch: int) -> worker_pb2.MeasureSpeedRequest:
        """Returns the request that has a rank measure its speed, with weights as it will hold them."""
        return worker_pb2.MeasureSpeedRequest(
            epoch=epoch, dtype=dtype_message(self.plan.dtype), quantization=quantization_message(self.quantization)
        )

    def load_request(
        self, shard: Shard, *, epoch: int, members: Sequence[worker_pb2.Member] = (), token: bytes = b""
    ) -> worker_pb2.LoadRequest:
        """Returns the request that has a rank load its shard.

        Args:
            members: all ranks of its replica, which know each other by ``token``; empty where there is one alone.
        """
        return worker_pb2.LoadRequest(
            epoch=epoch,
            model_path=self.model_path,
            dtype=dtype_message(self.plan.dtype),
            shard=shard_message(shard.rank, shard.part),
            block_size=self.plan.block_size,
            num_blocks=shard.num_blocks,
            token_budget=self.token_budget,
            max_num_seqs=self.max_num_seqs,
            max_context_tokens=self.max_context_tokens,
            prefix_cache=self.prefix_cache,
            quantization=quantization_message(self.quantization),
            members=members,
            token=token if members else b"",
        )
