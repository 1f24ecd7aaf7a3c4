"""The committed code is what the .proto files generate, and the files follow the style guide."""

import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def generated(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): path.read_text()
        for path in sorted((root / "heterodyne").rglob("*_pb2*"))
        if path.suffix in (".py", ".pyi")
    }


def test_make_protos_reproduces_the_committed_code(tmp_path: Path) -> None:
    subprocess.run(
        ["make", "--silent", "protos", f"PROTO_OUT={tmp_path}"], cwd=REPOSITORY, check=True, capture_output=True
    )
    fresh = generated(tmp_path)
    assert len(fresh) == 16
    assert fresh == generated(REPOSITORY / "protos")


def test_buf_lint_is_clean() -> None:
    buf = shutil.which("buf")
    if buf is None:
        pytest.skip("buf is not installed (npm install --global @bufbuild/buf)")
    result = subprocess.run([buf, "lint"], cwd=REPOSITORY / "protos", capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def test_every_message_between_processes_of_a_replica_carries_the_epoch() -> None:
    from protos.heterodyne.worker.v1 import worker_pb2

    for service in worker_pb2.DESCRIPTOR.services_by_name.values():
        for method in service.methods:
            for message in (method.input_type, method.output_type):
                assert "epoch" in message.fields_by_name, message.full_name
