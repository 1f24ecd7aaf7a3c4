"""Checks how much memory and how many cores a container's limits leave."""

import pytest

from placement.measured.cgroup import container_available, num_throttled, quota_cores, usable_cores

V1 = "/sys/fs/cgroup/memory"
V2 = "/sys/fs/cgroup"


def v1(group: str, limit: int, usage: int, cache: int = 0) -> dict[str, str]:
    return {
        f"{V1}{group}/memory.limit_in_bytes": f"{limit}\n",
        f"{V1}{group}/memory.usage_in_bytes": f"{usage}\n",
        f"{V1}{group}/memory.stat": f"rss 1\ntotal_active_file {cache // 2}\ntotal_inactive_file {cache // 2}\n",
    }


def v2(group: str, limit: int | str, usage: int, cache: int = 0) -> dict[str, str]:
    return {
        f"{V2}{group}/memory.max": f"{limit}\n",
        f"{V2}{group}/memory.current": f"{usage}\n",
        f"{V2}{group}/memory.stat": f"anon 1\nactive_file {cache // 2}\ninactive_file {cache // 2}\n",
    }


@pytest.mark.parametrize(
    ("groups", "files", "left"),
    [
        ("0::/\n", v2("", 1000, 300), 700),
        ("0::/\n", v2("", "max", 300), None),
        ("0::/a/b\n", v2("/a/b", "max", 1) | v2("/a", 500, 100) | v2("", 1000, 100), 400),
        ("7:cpu:/\n4:memory:/\n0::/\n", v1("", 1000, 300), 700),
        ("4:cpu,memory:/box/1\n", v1("", 900, 100), 800),  # the container's own group is its root
        ("0::/\n", v2("", 1000, 1500), 0),
        ("0::/\n", v2("", 1000, 900, cache=800), 900),
        ("4:memory:/\n", v1("", 1000, 900, cache=800), 900),
        ("0::/\n", {}, None),
        ("4:cpu:/\n", v1("", 1000, 300), None),
        ("", {}, None),
    ],
)
def test_the_tightest_group_counts_and_file_cache_does_not(
    groups: str, files: dict[str, str], left: int | None
) -> None:
    texts = {"/proc/self/cgroup": groups} | files
    assert container_available(lambda path: texts.get(path)) == left


def test_without_control_groups_nothing_is_limited() -> None:
    assert container_available(lambda path: None) is None
    assert usable_cores(8, lambda path: None) == 8


def v1_cpu(group: str, quota: int, period: int = 100_000, mounted: str = "cpu") -> dict[str, str]:
    directory = f"/sys/fs/cgroup/{mounted}{group}"
    return {f"{directory}/cpu.cfs_quota_us": f"{quota}\n", f"{directory}/cpu.cfs_period_us": f"{period}\n"}


def v2_cpu(group: str, text: str) -> dict[str, str]:
    return {f"{V2}{group}/cpu.max": f"{text}\n"}


@pytest.mark.parametrize(
    ("groups", "files", "allowed", "cores"),
    [
        ("0::/\n", v2_cpu("", "100000 100000"), 8, 1),
        ("0::/\n", v2_cpu("", "max 100000"), 8, 8),
        ("0::/box\n", v2_cpu("/box", "150000 100000"), 8, 1),  # part of a core is none
        ("0::/box\n", v2_cpu("/box", "399999 100000"), 8, 3),
        ("0::/box\n", v2_cpu("/box", "25000 100000"), 8, 1),
        ("0::/box\n", v2_cpu("/box", "400000 100000"), 3, 3),  # bound to fewer CPUs than the quota is worth
        ("0::/a/b/c\n", v2_cpu("/a/b/c", "max 100000") | v2_cpu("/a", "200000 100000"), 8, 2),  # a parent's quota
        ("0::/a/b\n", v2_cpu("/a/b", "300000 100000") | v2_cpu("/a", "200000 100000"), 8, 2),
        ("0::/seen/by/the/host\n", v2_cpu("", "200000 100000"), 8, 2),  # the container's own group is its root
        ("1:cpu:/box\n0::/\n", v1_cpu("/box", 100_000), 8, 1),
        ("1:cpu:/box\n0::/\n", v1_cpu("/box", -1), 8, 8),
        ("1:cpu:/box\n0::/\n", v1_cpu("/box", 75_000, 50_000), 8, 1),
        ("1:cpu:/a/b\n", v1_cpu("/a/b", -1) | v1_cpu("/a", 300_000), 8, 3),
        ("4:cpu,cpuacct:/docker/1\n", v1_cpu("", 200_000, mounted="cpu,cpuacct"), 8, 2),
        ("4:cpuset:/box\n", v1_cpu("/box", 100_000), 8, 8),  # another controller's group
        ("0::/\n", v2_cpu("", "100000"), 8, 8),
        ("0::/\n", v2_cpu("", "0 0"), 8, 8),
        ("0::/\n", {}, 8, 8),
        ("", {}, 1, 1),
    ],
)
def test_cores_are_those_of_the_affinity_within_the_tightest_quota(
    groups: str, files: dict[str, str], allowed: int, cores: int
) -> None:
    texts = {"/proc/self/cgroup": groups} | files
    assert usable_cores(allowed, lambda path: texts.get(path)) == cores


@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    [
        ("0::/a/b\n", v2_cpu("/a/b", "150000 100000") | v2_cpu("/a", "400000 100000"), 1.5),
        ("0::/box\n", v2_cpu("/box", "50000 100000"), 0.5),
        ("0::/box\n", v2_cpu("/box", "max 100000"), None),
        ("1:cpu:/box\n", v1_cpu("/box", 75_000, 50_000), 1.5),
        ("", {}, None),
    ],
)
def test_a_quota_is_worth_so_many_cores(groups: str, files: dict[str, str], cores: float | None) -> None:
    texts = {"/proc/self/cgroup": groups} | files
    assert quota_cores(lambda path: texts.get(path)) == cores


def throttled(group: str, periods: int) -> dict[str, str]:
    return {f"{group}/cpu.stat": f"usage_usec 900\nnr_periods 70\nnr_throttled {periods}\nthrottled_usec 5\n"}


def test_periods_in_which_a_group_or_one_above_it_was_held_up_are_counted() -> None:
    v2 = {"/proc/self/cgroup": "0::/a/b\n"} | throttled(f"{V2}/a/b", 3) | throttled(f"{V2}/a", 40)
    assert num_throttled(lambda path: v2.get(path)) == 43
    v1 = {"/proc/self/cgroup": "4:cpu,cpuacct:/box\n"} | throttled("/sys/fs/cgroup/cpu,cpuacct/box", 7)
    assert num_throttled(lambda path: v1.get(path)) == 7
    bare = {"/proc/self/cgroup": "0::/\n", f"{V2}/cpu.stat": "usage_usec 900\n"}
    assert num_throttled(lambda path: bare.get(path)) == num_throttled(lambda path: None) == 0
