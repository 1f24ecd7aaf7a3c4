"""``python -m orchestrator``."""

from orchestrator.cli import app

if __name__ == "__main__":
    app()
