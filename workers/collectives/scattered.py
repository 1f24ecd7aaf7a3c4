"""A sum whose rows are scattered over the ranks, which do what follows for their own and gather the results.

Reduce-scatter, residual, norm and all-gather (TokenWeave, Gond et al. 2025): see :mod:`kernels.cpu.layers.partial`. The
bits are those of a sum that all have, and that each does the rest with.
"""

from kernels.cpu.layers.partial import Partial
from workers.collectives.algorithms import Peers, all_gather, reduce_scatter


def reduce_and_finish(peers: Peers, partial: Partial) -> None:
    """Sums the rank's rows, finishes them, and gathers those of all. Raises PeerFailed.

    What is not on the host is copied there and back.
    """
    update, finish = partial.update, partial.finish
    assert finish is not None, "there is nothing to finish"
    on_host = update.cpu()  # itself, where it is there
    parts = on_host.tensor_split(peers.num_ranks)
    reduce_scatter(peers, parts)
    start = sum(map(len, parts[: peers.rank]))
    own = slice(start, start + len(parts[peers.rank]))
    if update.device.type != "cpu":
        update[own] = parts[peers.rank].to(update.device)
    finish.rows(own.start, own.stop)
    if update.device.type == "cpu":
        all_gather(peers, finish.result.tensor_split(peers.num_ranks))
    else:
        parts[peers.rank].copy_(finish.result[own])  # the copy's rows are done with
        all_gather(peers, parts)
        finish.result.copy_(on_host)
    partial.is_finished = True
