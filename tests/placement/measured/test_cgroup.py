"""Checks how much memory a container's limits leave."""

import pytest

from placement.measured.cgroup import container_available

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
