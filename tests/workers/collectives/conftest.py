from tests.workers.transport.conftest import make_meshes

__all__ = ["make_meshes"]
