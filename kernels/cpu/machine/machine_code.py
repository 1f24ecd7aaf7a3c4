"""Compiles LLVM IR at run time: for the target that is chosen for this CPU, or for other machines."""

from collections.abc import Sequence
from typing import Any

from llvmlite import binding

from kernels.cpu.machine.target import Target, compiled_for

_KEPT: list[Any] = []  # compiled code lives as long as its engine


def addresses(ir: str, names: Sequence[str]) -> dict[str, int]:
    """Compiles a module of LLVM IR for the chosen target, and returns the addresses of its functions ``names``."""
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    cpu, features = compiled_for()
    target = binding.Target.from_default_triple()
    machine = target.create_target_machine(cpu=cpu, features=features, opt=3, codemodel="jitdefault")
    engine = binding.create_mcjit_compiler(_optimized(ir, machine), machine)
    engine.finalize_object()
    _KEPT.append((engine, machine))
    return {name: engine.get_function_address(name) for name in names}


def object_code(ir: str, target: Target, triple: str) -> bytes:
    """Compiles a module of LLVM IR to an object file for another machine, such as ``aarch64-linux-gnu``."""
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    features = ",".join(f"+{name}" for name in sorted(target.needs))
    machine = binding.Target.from_triple(triple).create_target_machine(
        cpu=target.cpu, features=features, opt=3, reloc="pic"
    )
    code: bytes = machine.emit_object(_optimized(ir, machine))
    return code


def _optimized(ir: str, machine: Any) -> Any:
    """Reads and checks a module of LLVM IR, and optimizes it for a machine."""
    module = binding.parse_assembly(ir)
    module.verify()
    builder = binding.create_pass_builder(machine, binding.create_pipeline_tuning_options(speed_level=3))
    builder.getModulePassManager().run(module, builder)
    return module
