import re
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from kernels.cpu.machine.pages import HUGE_PAGE
from placement.errors import NotEnoughMemory
from placement.model.part import Span
from placement.model.specs import ModelSpec, RopeSpec
from workers.host.device import open_device
from workers.model.kv_cache import allocate_kv_cache, kv_cache_bytes

MODEL = ModelSpec(
    architecture="llama",
    num_layers=3,
    hidden_size=20,
    num_heads=15,
    num_kv_heads=5,
    head_dim=4,
    ffn_size=14,
    vocab_size=31,
    max_context_tokens=64,
    rms_norm_eps=1e-5,
    rope=RopeSpec(),
    tied_embeddings=False,
)


def test_a_cache_has_a_slot_for_every_layer_head_and_token() -> None:
    cache = allocate_kv_cache(MODEL, num_slots=48, dtype=torch.bfloat16, device=open_device("cpu", 1))
    assert [layer.keys.shape for layer in cache.layers] == [(5, 48, 4)] * 3
    assert [layer.values.shape for layer in cache.layers] == [(5, 48, 4)] * 3
    assert kv_cache_bytes(cache) == 2 * 3 * 5 * 48 * 4 * 2
    assert not any(layer.keys.any() or layer.values.any() for layer in cache.layers)


def test_a_cache_takes_memory_only_as_it_is_written() -> None:
    large = replace(MODEL, num_layers=1, num_kv_heads=1, head_dim=64)
    before = psutil.Process().memory_info().rss
    cache = allocate_kv_cache(large, num_slots=2**18, dtype=torch.bfloat16, device=open_device("cpu", 1))
    keys = cache.layers[0].keys
    assert kv_cache_bytes(cache) == 2**26
    assert psutil.Process().memory_info().rss - before < 2**24
    assert not keys[0, -1].any() and keys.data_ptr() % 64 == 0
    keys[0, -1] = 1
    assert keys[0, -1].all() and not keys[0, -2].any()


def test_a_large_cache_is_on_huge_pages_where_the_system_has_them() -> None:
    """Attention streams through huge pages in half the time."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text():
        pytest.skip("this system has no transparent huge pages, or has them switched off")
    large = replace(MODEL, num_layers=1, num_kv_heads=1, head_dim=64)
    cache = allocate_kv_cache(large, num_slots=2**16, dtype=torch.bfloat16, device=open_device("cpu", 1))
    for tensor in (cache.layers[0].keys, cache.layers[0].values):
        assert tensor.data_ptr() % HUGE_PAGE == 0
        assert "hg" in mapping_flags(tensor.data_ptr()), "advised to be huge"


def mapping_flags(address: int) -> list[str]:
    """Returns the flags that the system shows for this process's mapping at ``address``."""
    start, end = 0, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            start, end = (int(text, 16) for text in found.groups())
        elif line.startswith("VmFlags:") and start <= address < end:
            return line.split()[1:]
    return pytest.skip("this system does not show the flags of mappings")


def test_a_part_without_heads_has_an_empty_cache() -> None:
    cache = allocate_kv_cache(
        MODEL, num_slots=16, dtype=torch.float32, device=open_device("cpu", 1), kv_heads=Span(0, 0)
    )
    assert [layer.keys.shape for layer in cache.layers] == [(0, 16, 4)] * 3


def test_a_shard_caches_its_own_layers_and_heads() -> None:
    cache = allocate_kv_cache(
        MODEL,
        num_slots=16,
        dtype=torch.float32,
        device=open_device("cpu", 1),
        layers=Span(1, 3),
        kv_heads=Span(2, 3),
    )
    assert [layer.keys.shape for layer in cache.layers] == [(1, 16, 4)] * 2


def test_a_cache_that_cannot_fit_is_refused_before_it_is_allocated() -> None:
    huge = replace(MODEL, num_kv_heads=1000, head_dim=1000)
    with pytest.raises(NotEnoughMemory) as caught:
        allocate_kv_cache(huge, num_slots=2**31, dtype=torch.float32, device=open_device("cpu", 1))
    assert caught.value.field == "num_blocks"
