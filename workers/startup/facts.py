"""Gathers what a rank says of itself to the other ranks of its replica, from the load that it was asked for."""

import hashlib

from protos.codec.version import VERSION
from protos.heterodyne.worker.v1 import worker_pb2 as pb
from workers.collectives.algorithms import ORDER, candidates
from workers.host.device import Device
from workers.host.identity import code_digest, target_of
from workers.replica.agreement import RankFacts
from workers.startup.checks import CheckedLoad
from workers.transport.frames import FORMAT

_DIGEST_DIGITS = 12


def rank_facts(request: pb.LoadRequest, checked: CheckedLoad, device: Device) -> RankFacts:
    """Returns what this rank says of itself.

    Raises:
        InvalidConfig: the environment names a CPU target that cannot be.
    """
    limits, model = checked.limits, checked.model
    algorithms = {len(ranks): ", ".join(candidates(len(ranks))) for ranks in checked.roster.stages}
    sizes = {
        "block_size": limits.block_size,
        "num_blocks": request.num_blocks,
        "token_budget": limits.token_budget,
        "max_num_seqs": limits.max_num_seqs,
        "max_context_tokens": request.max_context_tokens,
        "prefix_cache": limits.prefix_cache,
    }
    return RankFacts(
        target=target_of(device.torch_device),
        values={
            "version": VERSION,
            "code": code_digest(),
            "frames": str(FORMAT),
            "sums": "; ".join([ORDER, *(f"{count} by {names}" for count, names in sorted(algorithms.items()))]),
            "model": _digest(model),
            "files": _digest(sorted(request.facts.fingerprint.items())),
            "tokens": f"{model.vocab_size} in the vocabulary, {list(model.eos_token_ids)} at an end, chosen by rank 0",
            "dtype": checked.dtype.value,
            "quantization": _format(checked),
            "limits": ", ".join(f"{name} {value}" for name, value in sizes.items()),
            "layout": _digest(checked.roster.parts),
        },
    )


def _format(checked: CheckedLoad) -> str:
    """Says how the weights of linear layers are held."""
    linear, quantization = checked.linear, checked.limits.quantization.value
    return quantization if linear is None else f"{quantization} of {linear.bits} bits with the digest {_digest(linear)}"


def _digest(value: object) -> str:
    """Returns a digest of a value that is written alike wherever it is the same."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:_DIGEST_DIGITS]
