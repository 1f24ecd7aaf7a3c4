"""Runs the gateway process: ``python -m orchestrator.gateway``, started by ``serve``. It does not use Ray."""

import argparse
import asyncio
import sys
from pathlib import Path

from orchestrator.config.document import load_config
from orchestrator.gateway.server import GatewaySettings, run
from placement.errors import HeterodyneError
from placement.model.specs import DType
from protos.codec.child_process import die_with_parent
from protos.codec.log_record import LEVELS, last_words, log_to_parent

SOURCE = "gateway"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m orchestrator.gateway", description="The public front.")
    parser.add_argument("config", type=Path, help="the cluster YAML")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one value")
    parser.add_argument("--control", required=True, help="host:port of the controller")
    parser.add_argument("--max-context-tokens", type=int, required=True)
    parser.add_argument("--dtype", choices=[dtype.value for dtype in DType], required=True)
    parser.add_argument("--embeddings", choices=["tied", "untied"], help="what the plan found them to be")
    parser.add_argument("--log-level", choices=LEVELS, default="info", help="the least important lines to log")
    parser.add_argument("--parent-pid", type=int, help="die with this process, which must be the parent")
    return parser.parse_args(argv)


def main() -> int:
    """Runs the gateway; returns the exit code."""
    args = parse()
    log_to_parent(SOURCE, level=args.log_level)
    if args.parent_pid is not None:
        die_with_parent(args.parent_pid)
    try:
        settings = GatewaySettings(
            config=load_config(args.config, overrides=args.set),
            control_address=args.control,
            max_context_tokens=args.max_context_tokens,
            dtype=DType(args.dtype),
            tied_embeddings=None if args.embeddings is None else args.embeddings == "tied",
        )
        return asyncio.run(run(settings))
    except HeterodyneError as error:
        last_words(str(error), source=SOURCE, as_record=True)
        return 2


if __name__ == "__main__":
    sys.exit(main())
