"""The benchmark runs, small, and writes its figures: on a GPU, or under Triton's interpreter."""

import json
from pathlib import Path

import pytest

from tests.support.triton.triton_cases import REASON, RUNS_HERE

if not RUNS_HERE:
    pytest.skip(REASON, allow_module_level=True)

from tests.gpu import bench_kernels


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
def test_a_small_run_writes_the_figures(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    assert bench_kernels.main(["--small", "--repeats", "2", "--output", str(output)]) == 0
    content = json.loads(output.read_text())
    metrics = content["metrics"]
    assert not content["left_out"]
    assert all(metric["value"] > 0 for metric in metrics.values())
    kernels = (
        "rms_norm",
        "add_rms_norm",
        "silu_mul",
        "rotate",
        "decode_attention_2x320",
        "shared_attention_2x256",
        "unshared_attention_2x256",
        "prefill_attention_20",
        "linear",
        "int4_linear_192x64_2",
        "int8_linear_64x64_2",
    )
    assert {f"{name}_share" for name in kernels} <= metrics.keys()
    for name in ("decode_b1", "decode_b3", "prefill"):
        assert f"{name}_over_transformers" in metrics
    assert {"decode_share_b1", "decode_share_b3", "prefill_share"} <= metrics.keys()
