"""Compiles LLVM IR for this CPU, at run time."""

from collections.abc import Sequence
from functools import cache
from typing import Any

from llvmlite import binding

_KEPT: list[Any] = []  # compiled code lives as long as its engine


@cache
def cpu_features() -> frozenset[str]:
    """Returns the features of this CPU by LLVM's names, for instance ``avx512bf16``."""
    return frozenset(name for name, has in binding.get_host_cpu_features().items() if has)


def addresses(ir: str, names: Sequence[str]) -> dict[str, int]:
    """Compiles a module of LLVM IR and returns the addresses of its functions ``names``."""
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    target = binding.Target.from_default_triple()
    features = binding.get_host_cpu_features().flatten()
    machine = target.create_target_machine(
        cpu=binding.get_host_cpu_name(), features=features, opt=3, codemodel="jitdefault"
    )
    module = binding.parse_assembly(ir)
    module.verify()
    builder = binding.create_pass_builder(machine, binding.create_pipeline_tuning_options(speed_level=3))
    builder.getModulePassManager().run(module, builder)
    engine = binding.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    _KEPT.append((engine, machine))
    return {name: engine.get_function_address(name) for name in names}
