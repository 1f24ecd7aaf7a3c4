"""When threads have cores for themselves and may spin, and when they share them and should not."""

from dataclasses import replace

import pytest

from placement.measured.core_share import (
    FEW_SPINS,
    MANY_SPINS,
    CoreShare,
    barrier_spins,
    openmp_waits,
    read_core_share,
    why_shared,
)

ALONE = CoreShare(num_threads=4, usable_cores=4, waiting=0.02, num_running=5, num_cores=4)


@pytest.mark.parametrize(
    ("share", "cause"),
    [
        (replace(ALONE, num_threads=5), "5 threads have 4 cores"),
        (replace(ALONE, throttled=True), "the container's CPU quota holds the process up"),
        (replace(ALONE, quota_cores=4.5), "the container's CPU quota of 4.5 cores is no whole number"),
        (replace(ALONE, waiting=0.1), "some thread waited for a core in 10% of the last ten seconds"),
        (replace(ALONE, waiting=None), "5 threads run on the machine's 4 cores"),
    ],
)
def test_a_team_that_shares_its_cores_spins_for_a_moment_only(share: CoreShare, cause: str) -> None:
    assert why_shared(share) == cause
    assert barrier_spins(share) == FEW_SPINS


@pytest.mark.parametrize("share", [replace(ALONE, num_threads=5), replace(ALONE, quota_cores=4.5)])
def test_threads_of_openmp_sleep_between_operations_where_cores_are_too_few_for_good(share: CoreShare) -> None:
    assert openmp_waits(share, {}) == {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"}


@pytest.mark.parametrize(
    "share", [ALONE, replace(ALONE, throttled=True), replace(ALONE, waiting=0.9), replace(ALONE, num_running=99)]
)
def test_what_goes_on_while_a_process_starts_does_not_have_them_sleep(share: CoreShare) -> None:
    assert openmp_waits(share, {}) == {"GOMP_SPINCOUNT": "1000"}


@pytest.mark.parametrize(
    "share",
    [
        ALONE,
        replace(ALONE, num_threads=1),
        replace(ALONE, quota_cores=4.0),
        replace(ALONE, waiting=None, num_running=4),
        replace(ALONE, waiting=None, num_running=0),
        replace(ALONE, waiting=0.09, num_running=100),  # the pressure says more than one moment does
    ],
)
def test_a_team_that_has_its_cores_for_itself_spins_for_long(share: CoreShare) -> None:
    assert why_shared(share) == ""
    assert barrier_spins(share) == MANY_SPINS


@pytest.mark.parametrize("name", ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME"])
def test_what_the_user_has_set_stays(name: str) -> None:
    assert openmp_waits(ALONE, {name: "active"}) == {}
    assert openmp_waits(replace(ALONE, num_threads=5), {name: "active"}) == {}


PRESSURE = "some avg10=50.00 avg60=39.07 avg300=25.33 total=1176\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n"


def test_the_share_is_read_from_the_files_of_the_system() -> None:
    files = {
        "/proc/self/cgroup": "0::/box\n",
        "/sys/fs/cgroup/box/cpu.max": "250000 100000\n",
        "/proc/pressure/cpu": PRESSURE,
        "/proc/loadavg": "2.77 2.27 1.67 7/122 21828\n",
    }
    share = read_core_share(3, num_allowed=8, num_cores=16, read=files.get, throttled=True)
    assert share == CoreShare(
        num_threads=3, usable_cores=2, quota_cores=2.5, throttled=True, waiting=0.5, num_running=7, num_cores=16
    )


@pytest.mark.parametrize(("pressure", "load"), [("", ""), ("full avg10=3.00\n", "1.0 1.0"), ("some\n", "1 1 1 x/9 4")])
def test_a_system_that_does_not_say_is_not_taken_for_shared(pressure: str, load: str) -> None:
    files = {"/proc/pressure/cpu": pressure, "/proc/loadavg": load}
    share = read_core_share(8, num_allowed=8, num_cores=8, read=files.get)
    assert share == CoreShare(num_threads=8, usable_cores=8, num_cores=8)
    assert barrier_spins(share) == MANY_SPINS
