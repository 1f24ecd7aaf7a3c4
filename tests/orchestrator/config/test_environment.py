"""Which environment variables are refused since nothing reads them, and what is said of each."""

import pytest

from orchestrator.config.document import settings_variables
from orchestrator.config.environment import unknown_variables


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
