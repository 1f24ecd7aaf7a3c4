"""Cores of a machine, shared out among its ranks."""

import os
import subprocess
import sys
import threading
from pathlib import Path

from workers.cores import claim_cores


def test_two_ranks_take_different_cores(tmp_path: Path) -> None:
    first = claim_cores(2, directory=tmp_path, allowed=[0, 1, 2, 3, 4])
    second = claim_cores(2, directory=tmp_path, allowed=[0, 1, 2, 3, 4])
    assert first.cores == {0, 1} and second.cores == {2, 3}
    assert claim_cores(2, directory=tmp_path, allowed=[0, 1, 2, 3, 4]).cores == frozenset(), "only one is left"
    first.release()
    third = claim_cores(3, directory=tmp_path, allowed=[0, 1, 2, 3, 4])
    assert third.cores == {0, 1, 4}
    second.release()
    third.release()


def test_a_rank_that_dies_gives_its_cores_back(tmp_path: Path) -> None:
    code = "import pathlib, sys; from workers.cores import claim_cores; c = claim_cores(2, directory=pathlib.Path(sys.argv[1]), allowed=[0, 1]); print(sorted(c.cores), flush=True); sys.stdin.read()"  # noqa: E501
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "[0, 1]\n"
        assert not claim_cores(1, directory=tmp_path, allowed=[0, 1]).cores
        process.kill()
        process.wait(10)
    claim = claim_cores(2, directory=tmp_path, allowed=[0, 1])
    assert claim.cores == {0, 1}
    claim.release()


def test_only_the_thread_that_pins_and_its_children_are_kept_to_the_cores(tmp_path: Path) -> None:
    core = min(os.sched_getaffinity(0))
    claim = claim_cores(1, directory=tmp_path, allowed=[core])
    before = os.sched_getaffinity(0)
    seen: list[set[int]] = []

    def child() -> None:
        seen.append(os.sched_getaffinity(0))

    def parent() -> None:
        claim.pin()
        thread = threading.Thread(target=child)
        thread.start()
        thread.join()

    thread = threading.Thread(target=parent)
    thread.start()
    thread.join()
    assert seen == [{core}]
    assert os.sched_getaffinity(0) == before
    claim.release()


def test_a_directory_that_is_a_link_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert not claim_cores(1, directory=tmp_path / "link", allowed=[0]).cores
    assert not list((tmp_path / "real").iterdir())


def test_a_place_that_cannot_be_written_leaves_the_rank_unpinned(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    claim = claim_cores(1, directory=tmp_path / "file" / "below")
    assert not claim.cores
    before = os.sched_getaffinity(0)
    claim.pin()
    assert os.sched_getaffinity(0) == before
