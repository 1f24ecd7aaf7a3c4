"""Decides how the keys and values of a prompt travel: each layer as it is computed, or all in one piece at the end."""

from placement.model.specs import DType, ModelSpec
from placement.serving.kv.peers import KvFormat
from placement.serving.kv.portions import bytes_per_token

LEAST_STREAMED_TOKENS = 64
"""From so many tokens on, layers are sent as they are computed. Splitwise (Patel et al. 2024) does so from about 512 on
GPUs with fast links; on slower links the last piece of a shorter prompt already takes longer than its layers' messages.
"""

LEASE_S = 3.0
"""How long a replica that takes part in a transfer may give no sign of life."""

SIGN_OF_LIFE_S = 0.5
"""How often it gives one."""

QUEUE_S = 30.0
"""How long a prompt may wait at the replica that is to compute it. Its blocks are reserved elsewhere meanwhile: two
replicas that compute prompts for each other could otherwise wait for each other's blocks for ever.
"""

_SLOWEST_BYTES_PER_S = 1e6


def streams_by_layer(num_tokens: int) -> bool:
    """Tells whether the layers of ``num_tokens`` tokens are sent one by one, as they are computed."""
    return num_tokens >= LEAST_STREAMED_TOKENS


def arrival_s(model: ModelSpec, num_tokens: int) -> float:
    """Returns how long keys and values may take to arrive once all are computed, in seconds, on the slowest network."""
    token_bytes = bytes_per_token(model, dtype=DType.FLOAT32, format=KvFormat.NATIVE, block_size=1)  # the most
    return LEASE_S + num_tokens * token_bytes / _SLOWEST_BYTES_PER_S
