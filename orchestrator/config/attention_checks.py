"""Refuses attention workers that contradict the rest of the configuration, or that leave no worker for the model."""

from collections.abc import Iterator, Mapping, Sequence

from orchestrator.config.attention import AttentionConfig
from orchestrator.config.pool_checks import unknown_names
from orchestrator.config.pools import NamedWorker, has_labels, members
from orchestrator.config.serving import ServingConfig
from orchestrator.config.source import Key, Layers
from placement.errors import InvalidConfig

_WHERE: Key = ("serving", "attention")
_REPLICAS: Key = ("serving", "parallelism", "replicas")


def attention_workers(attention: AttentionConfig | None, workers: Sequence[NamedWorker]) -> list[str]:
    """Returns the names of the attention workers, in the order of workers."""
    return [] if attention is None else members(attention, workers)


def model_workers(attention: AttentionConfig | None, workers: Sequence[NamedWorker]) -> list[NamedWorker]:
    """Returns the workers that hold a part of the model."""
    names = attention_workers(attention, workers)
    return [worker for worker in workers if worker.name not in names]


def check_attention(serving: ServingConfig, workers: Sequence[NamedWorker], layers: Layers) -> list[InvalidConfig]:
    """Returns a refusal for each contradiction."""
    attention = serving.attention
    if attention is None:
        return []
    errors = list(unknown_names(attention, workers, layers, _WHERE))
    names = members(attention, workers)
    if attention.node_labels and not any(has_labels(attention, worker) for worker in workers):
        problem = "are not among the node_labels of any worker"
        fix = "Give workers these node_labels in cluster.workers, or name the attention workers."
        errors.append(layers.refusal((*_WHERE, "node_labels"), dict(attention.node_labels), problem, fix))
    elif not names and not errors:
        fix = "Name its workers, as workers: [NAME], or labels that they have; or leave it out."
        errors.append(layers.refusal(_WHERE, None, "selects no worker", fix))
    if names and len(names) == len(workers):
        problem = "has all workers, so that none is left for the model"
        errors.append(layers.refusal((*_WHERE, "workers"), names, problem, "Leave out the workers of the model."))
    errors += _elsewhere(serving, workers, frozenset(names), layers)
    errors += _sequence_errors(serving, layers)
    return errors


def _elsewhere(
    serving: ServingConfig, workers: Sequence[NamedWorker], names: frozenset[str], layers: Layers
) -> Iterator[InvalidConfig]:
    """Yields a refusal for each attention worker that is in a pool or in a replica as well."""
    fix = "Take it out of one of the two: an attention worker holds no part of the model."
    for role, pool in () if serving.pools is None else serving.pools.each:
        for name in members(pool, workers):
            if name in names:
                problem = f"is an attention worker, and serving.pools.{role.value} selects it too"
                yield layers.refusal((*_WHERE, "workers"), name, problem, fix)
    for number, replica in enumerate(() if serving.parallelism is None else serving.parallelism.replicas):
        for name in (name for stage in replica.stages for name in stage.workers if name in names):
            problem = f"is an attention worker, and serving.parallelism.replicas[{number}] has it too"
            yield layers.refusal((*_WHERE, "workers"), name, problem, fix)


def _sequence_errors(serving: ServingConfig, layers: Layers) -> Iterator[InvalidConfig]:
    """Yields a refusal for each replica that answers and whose workers share sequences."""
    prefill: Mapping[str, None] = {}
    if serving.pools is not None and serving.pools.prefill is not None:
        prefill = dict.fromkeys(serving.pools.prefill.workers)
    for number, replica in enumerate(() if serving.parallelism is None else serving.parallelism.replicas):
        for index, stage in enumerate(replica.stages):
            computes_prompts = replica.role == "prefill" or any(name in prefill for name in stage.workers)
            if stage.sequence_split is not None and not computes_prompts:
                problem = (
                    "has workers keep the KV of the sequences that they share, and serving.attention has others keep it"
                )
                fix = "Use tensor_split or several stages instead, or leave serving.attention out."
                where = (*_REPLICAS, number, "stages", index, "sequence_split")
                yield layers.refusal(where, list(stage.sequence_split), problem, fix)
