"""The code of sums compiles for CPUs that this machine is not, and calls no function that would be missing there."""

import pytest

from tests.support.targets.other_machines import MACHINES, NUMBA, numba_ir, unknown_symbols
from workers.collectives import add_ir

SYSTEM = {"sendmsg", "recv", "poll", "clock_gettime", "__errno_location"}
"""The calls of the system by which the code sends, receives and waits."""


@pytest.mark.parametrize("machine", MACHINES)
def test_additions_compile_and_need_nothing(machine: str) -> None:
    assert not unknown_symbols(add_ir.module(), machine)


def test_the_all_reduce_compiles_and_calls_the_system_alone() -> None:
    missing = unknown_symbols(numba_ir("workers.collectives.direct_code", "module.compiled()"), "aarch64-linux-gnu")
    assert {name for name in missing if not NUMBA.match(name)} == SYSTEM
