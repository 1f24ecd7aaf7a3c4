"""CUDA graphs of decodes on a GPU: as the decoder computes without, whatever comes in between, on any GPU."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from placement.model.specs import ModelSpec
from protos.heterodyne.worker.v1 import worker_pb2 as pb
from tests.support.engine import Listener, engines, submission
from tests.support.oracle import CHECKPOINTS, Slots, chunk, greedy
from tests.support.steps import run
from tests.support.triton.triton_cases import DEVICE, HAS_GPU
from workers.host.device import open_device
from workers.startup.checks import read_model
from workers.startup.loading import Loaded, LoadJob
from workers.step.graphs import CudaCapture, DecodeGraphs
from workers.step.runner import ModelRunner

if not HAS_GPU:
    pytest.skip("torch sees no CUDA device here", allow_module_level=True)

from tests.support.triton.triton_runner import compute, lay_out, triton_runner

pytestmark = pytest.mark.gpu
MAX_DECODES = 20
LENGTHS = tuple(1 + 19 * i % 310 for i in range(MAX_DECODES))  # some of one part, some of two
PROMPTS = [[(7 * i + 31 * length) % 509 for i in range(length)] for length in LENGTHS]
ANSWER = 24


def graphs_of(runner: ModelRunner, max_tokens: int = 8000) -> DecodeGraphs:
    """Has the runner decode by graphs of up to MAX_DECODES."""
    runner.capture_decodes(CudaCapture(DEVICE), max_decodes=MAX_DECODES, max_tokens=max_tokens)
    assert runner._graphs is not None
    return runner._graphs


@torch.inference_mode()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("name", ["plain", "odd_heads_deep", "mistral", "qwen2", "qwen3", "gemma3"])
def test_decodes_of_every_number_are_as_without_graphs_and_write_the_same_kv(
    checkpoint: Callable[..., Path], name: str, dtype: torch.dtype, tolerance: float
) -> None:
    family, config = CHECKPOINTS[name]
    runner, slots = triton_runner(checkpoint(family, **config), dtype), Slots()
    runs = [slots.take(length) for length in LENGTHS]
    run(runner, [chunk(prompt, 0, len(prompt), where) for prompt, where in zip(PROMPTS, runs, strict=True)])
    graphs, layers = graphs_of(runner), runner._cache.layers
    for count in (*range(1, MAX_DECODES + 1), 3, 1):
        decodes = [chunk(PROMPTS[i], LENGTHS[i] - 1, LENGTHS[i], runs[i]) for i in range(count)]
        expected = compute(runner, lay_out(runner, decodes))
        kept = [(layer.keys.clone(), layer.values.clone()) for layer in layers]
        inputs = lay_out(runner, decodes)
        assert graphs.can_run(inputs)
        scale = float(expected.abs().max())
        torch.testing.assert_close(graphs(inputs), expected, atol=tolerance * scale, rtol=0)
        for layer, (keys, values) in zip(layers, kept, strict=True):
            torch.testing.assert_close(layer.keys, keys, atol=tolerance, rtol=tolerance)
            torch.testing.assert_close(layer.values, values, atol=tolerance, rtol=tolerance)


@torch.inference_mode()
def test_a_graph_gives_the_same_bits_each_time_and_alone_as_beside_prefills(checkpoint: Callable[..., Path]) -> None:
    """Prefills, which no graph takes, use memory of their own in between."""
    runner, slots = triton_runner(checkpoint("llama")), Slots()
    where = slots.take(LENGTHS[1])
    run(runner, [chunk(PROMPTS[1], 0, LENGTHS[1], where)])
    graphs = graphs_of(runner)
    decode = [chunk(PROMPTS[1], LENGTHS[1] - 1, LENGTHS[1], where)]
    first = graphs(lay_out(runner, decode)).clone()
    other = slots.take(LENGTHS[2])
    for _ in range(5):
        run(runner, [chunk(PROMPTS[2], 0, LENGTHS[2], other)])
        assert torch.equal(graphs(lay_out(runner, decode)), first)


def test_preempted_sequences_go_on_with_the_same_tokens(checkpoint: Callable[..., Path]) -> None:
    path = checkpoint("llama")
    oracle = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    prompts = [PROMPTS[i] for i in (0, 1, 2, 3)]
    expected = {index: greedy(oracle, prompt)[:ANSWER] for index, prompt in enumerate(prompts)}
    runner, listener = triton_runner(path), Listener()
    graphs_of(runner)
    with engines() as make:
        parts = make(runner, num_blocks=20, max_num_seqs=MAX_DECODES)
        for index, prompt in enumerate(prompts):
            parts.engine.submit(listener, index, submission(prompt, max_tokens=ANSWER))
        listener.wait_ends(len(prompts))
        parts.idle()
    assert sum(end.num_preemptions for end in listener.ends.values()) > 0
    assert dict(listener.tokens) == expected


def load(path: Path, device: str) -> Loaded:
    """A rank, as a worker loads it."""
    model = read_model(path)
    return LoadJob(request=_request(path, model), device=open_device(device, 1)).run()


def _request(path: Path, model: ModelSpec) -> pb.LoadRequest:
    return pb.LoadRequest(
        model_path=str(path),
        dtype=pb.DTYPE_FLOAT32,
        shard=pb.Shard(
            layers={"stop": model.num_layers},
            kv_heads={"stop": model.num_kv_heads},
            ffn_columns={"stop": model.ffn_size},
            vocab_rows={"stop": model.vocab_size},
        ),
        block_size=16,
        num_blocks=200,
        token_budget=256,
        max_num_seqs=MAX_DECODES,
        max_context_tokens=400,
    )


def answers(loaded: Loaded) -> dict[int, list[int]]:
    """Of all prompts at once, by the engine's own threads."""
    listener, engine = Listener(), loaded.engine
    engine.thread.start()
    for index, prompt in enumerate(PROMPTS):
        engine.submit(listener, index, submission(prompt, max_tokens=ANSWER))
    listener.wait_ends(len(PROMPTS))
    engine.stop()
    engine.thread.join(timeout=60)
    assert engine.failure is None
    return dict(listener.tokens)


def test_a_loaded_rank_decodes_by_graphs_with_the_tokens_of_transformers(served_checkpoint: Path) -> None:
    oracle = AutoModelForCausalLM.from_pretrained(served_checkpoint, dtype=torch.float32).eval()
    loaded = load(served_checkpoint, "cuda:0")
    runner = loaded.engine._runner
    assert isinstance(runner, ModelRunner) and runner._graphs is not None
    assert answers(loaded) == {index: greedy(oracle, prompt)[:ANSWER] for index, prompt in enumerate(PROMPTS)}


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch sees one CUDA device here")
def test_a_rank_on_the_second_gpu_answers_alike_and_leaves_the_first_alone(served_checkpoint: Path) -> None:
    expected = answers(load(served_checkpoint, "cuda:0"))
    torch.cuda.synchronize(0)
    torch.cuda.reset_peak_memory_stats(0)
    before, current = torch.cuda.memory_allocated(0), torch.cuda.current_device()
    try:
        assert answers(load(served_checkpoint, "cuda:1")) == expected
        assert torch.cuda.max_memory_allocated(0) == before
    finally:
        torch.cuda.set_device(current)  # loading has set it, of this thread
