"""The operations of a program run in order, each on a whole team of threads."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.cpu.layers import program
from kernels.cpu.layers.program import Program
from kernels.cpu.machine import threads
from kernels.cpu.machine.target import chosen
from kernels.cpu.products import matmul
from kernels.cpu.products.tiling import Layout, shapes
from kernels.cpu.rows import rows

pytestmark = pytest.mark.every_target


def add_tiles(
    made: Program, x: torch.Tensor, output: torch.Tensor, num_rows: int, num_threads: int, *, widens: bool = False
) -> None:
    packing = program.pack_tiles(
        x.data_ptr(),
        output.data_ptr(),
        num_tokens=len(x),
        num_pairs=x.shape[1] // 2,
        shape=(len(output), num_rows),
        num_threads=num_threads,
        ticket=made.ticket(),
        widens=widens,
    )
    made.add(*packing)


@given(
    num_tokens=st.integers(1, 70), num_vectors=st.integers(1, 40), num_threads=st.integers(1, 4), seed=st.integers(0, 9)
)
@settings(max_examples=60, deadline=None)
def test_rows_become_tiles(num_tokens: int, num_vectors: int, num_threads: int, seed: int) -> None:
    x = torch.randn(num_tokens, 32 * num_vectors, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
    num_tiles, num_rows, _ = shapes(chosen()).shape_for(num_tokens)
    for widens in (False, True) if num_rows > 1 else (False,):
        expected = matmul.in_tiles(x, num_tiles, num_rows, Layout.FLOATS if widens else Layout.PAIRS)
        output = torch.full_like(expected, -1)
        made = Program(1)
        add_tiles(made, x, output, num_rows, num_threads, widens=widens)
        made.run(num_threads)
        assert torch.equal(output, expected)


@pytest.mark.parametrize("num_threads", [1, 2, 3, 8])
def test_each_operation_sees_all_that_those_before_it_did(num_threads: int) -> None:
    """A chain of sums, each over the one before; with more threads than cores some always come late."""
    num_rows, width, num_operations = 48, 1024, 150
    weight = torch.ones(width, dtype=torch.bfloat16)
    updates = [torch.randn(num_rows, width).to(torch.bfloat16) for _ in range(num_operations)]
    residual = torch.zeros(num_rows, width, dtype=torch.bfloat16)
    normed = torch.empty_like(residual)
    made = Program(num_operations)
    for update in updates:
        pointers = (x.data_ptr() for x in (update, residual, weight, normed, residual))
        strides = (2 * width, 2 * width, 0, 2 * width, 2 * width)
        fields = (*pointers, *strides, width, rows.float_bits(1e-5))
        made.add(*rows.each_row("add_norm", num_rows, num_rows * width, num_threads, made.ticket(), fields))
    expected = torch.zeros_like(residual)
    for update in updates:
        expected_normed, expected = rows.add_rms_norm(update, expected, weight, 1e-5)
    for _ in range(5):
        residual.zero_()
        made.run(num_threads)
        assert torch.equal(residual, expected) and torch.equal(normed, expected_normed)


def test_arguments_may_change_between_runs() -> None:
    first, second = (torch.randn(4, 64).to(torch.bfloat16) for _ in range(2))
    output = torch.empty(1, 32, 4, dtype=torch.int32)
    made = Program(2)
    add_tiles(made, first, output, 4, num_threads=2)
    made.run(2)
    assert torch.equal(output, matmul.in_tiles(first, 1, 4, Layout.PAIRS))
    addresses, ticket = (second.data_ptr(), output.data_ptr()), made.ticket()
    _, arguments = program.pack_tiles(
        *addresses, num_tokens=4, num_pairs=32, shape=(1, 4), num_threads=1, ticket=ticket, widens=False
    )
    made.change(0, arguments)
    made.run(2)
    assert torch.equal(output, matmul.in_tiles(second, 1, 4, Layout.PAIRS))


def test_without_openmp_one_thread_does_it_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_openmp_parallel", lambda: None)
    monkeypatch.setattr(threads, "team_size", lambda: 0)
    x = torch.randn(9, 64).to(torch.bfloat16)
    output = torch.empty(1, 32, 9, dtype=torch.int32)
    made = Program(1)
    add_tiles(made, x, output, 9, num_threads=4)
    made.run(4)
    assert torch.equal(output, matmul.in_tiles(x, 1, 9, Layout.PAIRS))


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_an_operation_ends_the_program_for_all_threads(num_threads: int) -> None:
    word, rest = torch.zeros(8, dtype=torch.int64), torch.ones(64, dtype=torch.int64)
    made = Program(3)
    made.add(*program.operation("fill_zeros", made.ticket(), word.data_ptr() + 8, 8))
    made.add(*program.operation("fill_zeros", made.ticket(), rest.data_ptr(), 8))
    for _ in range(50):
        rest.fill_(1)
        made.run(num_threads, ended_by=word.data_ptr())
        assert rest[0] == 0, "nothing ends it"
        rest.fill_(1)
        word[0] = 1
        made.run(num_threads, ended_by=word.data_ptr())
        assert rest[0] == 1, "it ends before the second operation"
        word[0] = 0


@pytest.mark.parametrize("num_threads", [1, 2])
def test_zeros_are_written_by_one_thread(num_threads: int) -> None:
    memory = torch.ones(1000, dtype=torch.int64)
    made = Program(1)
    made.add(*program.operation("fill_zeros", made.ticket(), memory[10:].data_ptr(), 8 * 500))
    made.run(num_threads)
    assert memory[:10].all() and not memory[10:510].any() and memory[510:].all()


@pytest.mark.parametrize("spins", [0, 1, 50, 10_000])
def test_threads_meet_however_often_they_spin(monkeypatch: pytest.MonkeyPatch, spins: int) -> None:
    monkeypatch.setattr(program, "_spins", 2000)  # restores it
    program.set_spins(spins)
    test_each_operation_sees_all_that_those_before_it_did(num_threads=3)
