"""The sizes that a configured deployment's replicas serve within. Pure."""

from orchestrator.config.document import Config
from placement.model.quantization import Quantization
from placement.planning.limits import ReplicaLimits, most_auto_tokens


def replica_limits(config: Config) -> ReplicaLimits:
    """Returns the sizes of every replica. A budget that replicas choose has the most that it can be as yet."""
    serving = config.serving
    kinds = [worker.device.partition(":")[0] for worker in config.cluster.workers]
    return ReplicaLimits(
        block_size=serving.block_size,
        token_budget=serving.token_budget or most_auto_tokens(kinds, max_num_seqs=serving.max_num_seqs),
        step_time_s=serving.step_time_s if serving.token_budget is None else None,
        max_num_seqs=serving.max_num_seqs,
        prefix_cache=serving.prefix_cache,
        quantization=Quantization(config.model.quantization),
    )
