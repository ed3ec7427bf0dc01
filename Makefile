# One environment, .venv, for everything. PYTHON chooses the interpreter it is made with.
PYTHON ?= python3
BIN := .venv/bin
OUT := demo-out
# PyTorch's threads would spin while ONNX Runtime's work, and the other way round
export OMP_WAIT_POLICY := PASSIVE

.PHONY: demo test test-slow plugin-check gpu-check full-size peers scaling lint clean

demo: .venv/ready
	rm -rf $(OUT)
	$(BIN)/tokprune-export --model demo --method lofi --out $(OUT)/lofi
	$(BIN)/tokprune-export --model demo --method none --out $(OUT)/unpruned
	$(BIN)/tokprune demo-data --n 24 --out $(OUT)/scenes
	$(BIN)/tokprune verify $(OUT)/lofi --reference demo --data $(OUT)/scenes/data.jsonl
	$(BIN)/tokprune bench $(OUT)/lofi --against $(OUT)/unpruned --rounds 10
	$(BIN)/tokprune run $(OUT)/lofi --image $(OUT)/scenes/images/00000.png \
		--prompt "How many digits are there?" --prompt "Which digit is highest?" --overlay $(OUT)/kept.png

# What needs NVIDIA's headers or a GPU is left to plugin-check and gpu-check. Most tests use one core, so files are
# tested side by side; each process makes the fixtures of a session for itself, but shares the graphs that it traced.
test: .venv/ready lint
	$(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist loadfile -m "not slow and not plugin and not gpu"

test-slow: .venv/ready
	$(BIN)/pytest -m slow

# The plugin library against each TENSORRT_INCLUDE_DIR=DIR:DIR, in NVIDIA's registry, parser and builder; without a GPU.
# Needs nvcc, cmake, g++ and the headers; skips nothing.
plugin-check: .venv/ready
	$(BIN)/pip install --quiet --constraint tests/constraints.txt --editable .[dev,plugin-check]
	$(BIN)/pytest -m plugin

# On a machine with a GPU, nvcc and TensorRT's headers: the plugins, natively built, against float64, and what they take.
# TOKPRUNE_GPU_CASES=1000 draws as many for the comparison of kept sets, 100 if not set.
gpu-check: .venv/ready
	$(BIN)/pytest -m gpu -s

# a 7B checkpoint of random weights: exported, read by NVIDIA's parser, held against PyTorch over its first layers
full-size: .venv/ready
	$(BIN)/python benchmarks/full_size.py --size 7b --work full-size

# Our bundles on this machine's CPU beside what one would use instead, into docs/performance.md; WORK keeps all that is
# made. Peers need environments of their own: PEERS="--peer-python openvino=PATH --peer-python llama=PATH".
WORK := benchmark-work
peers: .venv/ready
	$(BIN)/python benchmarks/peers.py --work $(WORK)/peers $(PEERS) --docs docs/performance.md

# how prefill time grows with kept tokens, prune layer, context and batch, into the same page
scaling: .venv/ready
	$(BIN)/python benchmarks/scaling.py --work $(WORK)/scaling --docs docs/performance.md

lint: .venv/ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	MYPYPATH=.venv/typing $(BIN)/mypy

# mypy does not follow the mapping of folders to import names, so it gets the same mapping as links
.venv/ready: pyproject.toml tests/constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint tests/constraints.txt --editable .[dev]
	mkdir -p .venv/typing/tokprune
	for folder in runtime plugins calibration export; do ln -sfn $(CURDIR)/$$folder .venv/typing/tokprune/$$folder; done
	touch $@

clean:
	rm -rf .venv $(OUT) build dist *.egg-info
