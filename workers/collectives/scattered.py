"""A reduce-scatter of rows, after which each rank computes residual and norm of its own rows, and an all-gather.

(TokenWeave, Gond et al. 2025; see :mod:`kernels.cpu.layers.partial`.) The bits are those of an all-reduce after which
every rank computes residual and norm of all rows.
"""

from kernels.cpu.layers.partial import Partial
from workers.collectives.algorithms import Peers, all_gather, reduce_scatter


def reduce_and_finish(peers: Peers, partial: Partial) -> None:
    """Reduces and finishes this rank's rows, and gathers the finished rows of all ranks. Raises PeerFailed.

    Tensors that are not on the host are copied there and back.
    """
    update, finish = partial.update, partial.finish
    assert finish is not None, "there is nothing to finish"
    on_host = update.cpu()  # the same tensor, where it is on the host
    chunks = on_host.tensor_split(peers.num_ranks)
    reduce_scatter(peers, chunks)
    start = sum(map(len, chunks[: peers.rank]))
    own = slice(start, start + len(chunks[peers.rank]))
    if update.device.type != "cpu":
        update[own] = chunks[peers.rank].to(update.device)
    finish.rows(own.start, own.stop)
    if update.device.type == "cpu":
        all_gather(peers, finish.result.tensor_split(peers.num_ranks))
    else:
        chunks[peers.rank].copy_(finish.result[own])  # the sums on the host are no longer needed
        all_gather(peers, chunks)
        finish.result.copy_(on_host)
    partial.is_finished = True
