"""serving.parallelism of the cluster YAML: what is taken, what is refused, and what the refusal says."""

from pathlib import Path

import pytest

from orchestrator.errors import InvalidConfigs
from placement.errors import InvalidConfig
from tests.support.deploying.configs import MINIMAL, load

CUT = MINIMAL + "cluster: {workers: [{name: a}, {name: b}, {}]}\nserving: {parallelism: %s}\n"


def stages(*stages: str) -> str:
    return CUT % f"{{replicas: [{{stages: [{', '.join(stages)}]}}]}}"


def test_a_replica_is_cut_over_workers_by_their_names(tmp_path: Path) -> None:
    config = load(tmp_path, stages("{workers: [b, worker-2], tensor_split: [3, 1.5]}", "{workers: [a], layers: 4}"))
    assert config.cluster.worker_names == ("a", "b", "worker-2")
    assert config.serving.parallelism is not None
    first, second = config.serving.parallelism.replicas[0].stages
    assert (first.workers, first.tensor_split, first.layers) == (("b", "worker-2"), (3.0, 1.5), None)
    assert (second.workers, second.tensor_split, second.layers) == (("a",), None, 4)


def test_auto_is_the_default(tmp_path: Path) -> None:
    assert load(tmp_path, CUT % "auto").serving == load(tmp_path, MINIMAL).serving


def test_counted_workers_have_numbered_names(tmp_path: Path) -> None:
    text = MINIMAL + "cluster: {workers: [{name: a, count: 2}, {count: 2}]}\n"
    assert load(tmp_path, text).cluster.worker_names == ("a-0", "a-1", "worker-2", "worker-3")


@pytest.mark.parametrize(
    ("text", "field", "problem"),
    [
        (CUT % "atuo", "serving.parallelism", "is neither auto nor a section"),
        (CUT % "{replicas: []}", "serving.parallelism.replicas", "is empty"),
        (stages("{workers: [a, b, c]}"), "serving.parallelism.replicas.0.stages.0.workers.2", "is not the name of a"),
        (stages("{workers: [a, b, a]}"), "serving.parallelism.replicas.0.stages.0.workers.2", "holds another part"),
        (stages("{workers: [a, b]}", "{workers: [b, worker-2]}"),
         "serving.parallelism.replicas.0.stages.1.workers.0", "holds another part already"),
        (stages("{workers: [a, b]}"), "cluster.workers", "is in no replica of serving.parallelism"),
        (stages("{workers: [a, b, worker-2], tensor_split: [1, 1]}"),
         "serving.parallelism.replicas.0.stages.0.tensor_split", "has 2 shares for 3 workers"),
        (stages("{workers: [a, b, worker-2], sequence_split: [1]}"),
         "serving.parallelism.replicas.0.stages.0.sequence_split", "has 1 shares for 3 workers"),
        (stages("{workers: [a, b, worker-2], tensor_split: [1, 1, 1], sequence_split: [1, 1, 1]}"),
         "serving.parallelism.replicas.0.stages.0.sequence_split", "share either layers or sequences"),
        (stages("{workers: [a, b, worker-2], tensor_split: [1, 1, -1]}"),
         "serving.parallelism.replicas.0.stages.0.tensor_split.2", "is below 0"),
        (stages("{workers: [a, b, worker-2], tensorsplit: [1]}"),
         "serving.parallelism.replicas.0.stages.0.tensorsplit", "is not a known key"),
        (MINIMAL + "cluster: {workers: [{name: worker-1}, {}]}\n", "cluster.workers", "is the name of more than one"),
    ],
)  # fmt: skip
def test_a_cut_that_makes_no_sense_is_refused_by_its_field(tmp_path: Path, text: str, field: str, problem: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        load(tmp_path, text)
    first = caught.value.errors[0] if isinstance(caught.value, InvalidConfigs) else caught.value
    assert first.field == field
    assert problem in first.problem and first.fix
