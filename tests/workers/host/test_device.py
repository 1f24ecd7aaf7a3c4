import errno
import sys
from types import SimpleNamespace

import psutil
import pytest
import torch

from placement.errors import InvalidConfig
from workers.host import device
from workers.host.device import is_out_of_memory, open_device, return_freed


def test_the_cpu_opens_with_its_memory_and_threads() -> None:
    opened = open_device("cpu", 1)
    assert opened.name == "cpu"
    assert opened.torch_device == torch.device("cpu")
    assert torch.get_num_threads() == opened.num_threads == 1
    assert 0 < opened.available_memory_bytes <= opened.total_memory_bytes


def test_a_container_leaves_the_cpu_what_its_limit_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "container_available", lambda read: 1234)
    assert open_device("cpu", 1).available_memory_bytes == 1234
    monkeypatch.setattr(device, "container_available", lambda read: None)
    assert open_device("cpu", 1).available_memory_bytes > 1234


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("shapes differ"), False),
        (OSError("not found"), False),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
    ],
)
def test_errors_of_memory_are_told_from_others(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_the_allocator_of_the_cpu_is_understood() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize("name", ["", "gpu", "cuda", "cuda:", "cuda:-1", "cuda:01", "cuda:1x", "CPU", "cpu:0", "meta"])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        open_device(name, 1)
    assert (caught.value.field, caught.value.value) == ("device", name)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InvalidConfig, match="torch sees 2 GPUs"):
        open_device("cuda:2", 1)


def test_a_gpu_reports_its_own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = SimpleNamespace(device_count=lambda: 2, mem_get_info=lambda where: (30 + where.index, 80))
    monkeypatch.setattr(device.torch, "cuda", cuda)
    opened = open_device("cuda:1", 1)
    assert opened.torch_device == torch.device("cuda", 1)
    assert (opened.available_memory_bytes, opened.total_memory_bytes) == (31, 80)


@pytest.mark.parametrize("num_threads", [0, -1, 2**31, True])
def test_impossible_numbers_of_threads_are_refused(num_threads: int) -> None:
    before = torch.get_num_threads()
    with pytest.raises(InvalidConfig) as caught:
        open_device("cpu", num_threads)
    assert caught.value.field == "threads"
    assert torch.get_num_threads() == before


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc can")
def test_memory_that_was_let_go_between_pieces_that_were_not_is_returned() -> None:
    pieces = [bytearray(b"x" * (96 << 10)) for _ in range(1000)]
    kept = pieces[::100]
    pieces.clear()
    before = psutil.Process().memory_info().rss
    return_freed()
    assert before - psutil.Process().memory_info().rss > 50 << 20
    assert len(kept) == 10
