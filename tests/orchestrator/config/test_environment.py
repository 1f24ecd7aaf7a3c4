"""Which environment variables are refused since nothing reads them, and what is said of each."""

from pathlib import Path

import pytest

from orchestrator.config.document import load_config, settings_variables
from orchestrator.config.environment import unknown_variables, wrong_target
from placement.errors import InvalidConfig
from placement.measured.targets import CPU_TARGETS


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("HETERODYNE_GATEWAY_ADDRESS", "Write HETERODYNE_GATEWAY__ADDRESS, or unset it."),
        ("HETERODYNE_SERVING_KV_CACHE", "Write HETERODYNE_SERVING__KV_CACHE, or unset it."),
        ("HETERODYNE_SERVING_MAX_NUM_SEQ", "Write HETERODYNE_SERVING__MAX_NUM_SEQS, or unset it."),
        ("HETERODYNE_ADRESS", "Write HETERODYNE_ADDRESS, or unset it."),
        (
            "HETERODYNE_COLOUR",
            "Write it as HETERODYNE_SECTION__KEY, with two underscores between section and key, or unset it.",
        ),
    ],
)
def test_a_variable_that_nothing_reads_is_refused_with_the_nearest_name(name: str, fix: str) -> None:
    (error,) = unknown_variables({name: "x"}, settings_variables())
    assert (error.field, error.value, error.fix) == (f"environment variable {name}", None, fix)


def test_variables_that_are_read_or_set_by_others_are_let_be() -> None:
    environ = {
        "HETERODYNE_ADDRESS": "h:1",
        "HETERODYNE_CHECK_STATE": "1",
        "HETERODYNE_GATEWAY__ADDRESS": "h:1",
        "HETERODYNE_GATEWAY__ADRESS": "",  # refused as a key, with the keys that there are
        "PATH_HETERODYNE_X": "",
        # As Kubernetes sets them for services named heterodyne and heterodyne-gateway.
        "HETERODYNE_SERVICE_HOST": "10.0.0.1",
        "HETERODYNE_SERVICE_PORT_GRPC": "50051",
        "HETERODYNE_PORT": "tcp://10.0.0.1:50051",
        "HETERODYNE_PORT_50051_TCP_ADDR": "10.0.0.1",
        "HETERODYNE_GATEWAY_SERVICE_PORT": "50051",
        "HETERODYNE_GATEWAY_PORT_50051_TCP": "tcp://10.0.0.1:50051",
    }
    assert unknown_variables(environ, settings_variables()) == []


def test_a_cpu_target_that_there_is_not_is_refused_with_all_that_there_are() -> None:
    error = wrong_target({"HETERODYNE_CPU_TARGET": "avx-2"})
    assert error is not None
    assert str(error) == (
        "environment variable HETERODYNE_CPU_TARGET: is not a CPU target (got 'avx-2'). "
        "Set it to one of amx, avx512bf16, avx512f, avx2, generic, or unset it."
    )


def test_a_cpu_target_that_there_is_is_let_be() -> None:
    assert wrong_target({}) is wrong_target({"HETERODYNE_CPU_TARGET": ""}) is None
    assert [wrong_target({"HETERODYNE_CPU_TARGET": name}) for name in CPU_TARGETS] == [None] * len(CPU_TARGETS)


def test_a_wrong_cpu_target_is_refused_with_the_configuration(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("model: {path: here}\n")
    with pytest.raises(InvalidConfig, match="HETERODYNE_CPU_TARGET: is not a CPU target"):
        load_config(file, environ={"HETERODYNE_CPU_TARGET": "fastest"})
    load_config(file, environ={"HETERODYNE_CPU_TARGET": "avx512bf16"})
