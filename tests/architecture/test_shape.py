"""The house keeps its shape: small files, short functions, few files beside each other, no circles of imports."""

import ast
import statistics
import subprocess
from collections import Counter, defaultdict
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
ROOMS = ("orchestrator", "workers", "placement", "kernels", "protos")
GENERATED = REPOSITORY / "protos" / "heterodyne"

MOST_FILES = 16
MOST_LINES = 400
MOST_MEDIAN_LINES = 120
MOST_FUNCTION_LINES = 40

LONG_FUNCTIONS = frozenset(
    {
        "kernels.cpu.layers.layer_ir._rotate_token",
        "kernels.cpu.machine.columns_ir.columns_function",
        "kernels.cuda.quantized_kernels.product_kernel",
    }
)
"""Functions that are longer all the same. The list only shrinks."""


def tracked(*suffixes: str) -> list[Path]:
    """The files of the repository that people write."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    files = [REPOSITORY / name for name in listed if name.endswith(suffixes)]
    return [path for path in files if path.exists() and GENERATED not in path.parents]


def product() -> list[Path]:
    """The Python files of the rooms."""
    return [path for path in tracked(".py") if path.relative_to(REPOSITORY).parts[0] in ROOMS]


def num_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def module(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, modules: set[str]) -> Iterator[str]:
    """The modules of ours that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in modules else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_no_folder_has_too_many_files_beside_each_other() -> None:
    counts = Counter(path.parent for path in tracked(".py", ".proto") if path.name != "__init__.py")
    crowded = {str(folder.relative_to(REPOSITORY)): count for folder, count in counts.items() if count > MOST_FILES}
    assert not crowded


def test_files_are_small() -> None:
    lines = {str(path.relative_to(REPOSITORY)): num_lines(path) for path in tracked(".py")}
    assert not {name: count for name, count in lines.items() if count > MOST_LINES}
    written = [num_lines(path) for path in product() if path.name != "__init__.py"]
    assert statistics.median(written) <= MOST_MEDIAN_LINES


def test_functions_are_short() -> None:
    found = set()
    for path in product():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                if node.end_lineno - node.lineno + 1 > MOST_FUNCTION_LINES:
                    found.add(f"{module(path)}.{node.name}")
    assert found == LONG_FUNCTIONS, "cut new ones; take those off the list that were cut"


def test_imports_have_no_circle() -> None:
    files = {module(path): path for path in product()}
    graph: defaultdict[str, set[str]] = defaultdict(set)
    for name, path in files.items():
        graph[name] = {other for other in imports(path, set(files)) if other in files and other != name}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from None
