# `make demo` and `make test` are all that a new user needs; both set up .venv first, once.
# PYTHON=/path/to/python3.12 picks the interpreter; otherwise the first of python3.13, 3.12, 3.11, python3 that fits.
.SUFFIXES:
PYTHON ?=
UPGRADE ?=
TORCH ?=
BIN = .venv/bin

.PHONY: help demo test lint site attack chaos client bench adversary bench-tls testbed up down status gpu torch head lock clean

help:
	@echo "make demo    run the main job on an embedded cluster of three nodes, and stop it again"
	@echo "make test    every check: lint, types, import contracts, tests"
	@echo "make site    docs/ as a site, with the API reference: build/site/index.html"
	@echo "make attack  every attack beside its positive control, every control removed once; writes docs/attacks.md"
	@echo "make chaos   more ways for processes to end than make test has time for, and a quick benchmark"
	@echo "make client  the jobs and proofs of make test once more, with zones that reach Ray by its client"
	@echo "make bench   measure against plain Ray"
	@echo "make adversary what captured GPU nodes can tell of order, place and calls; writes docs/adversary.md"
	@echo "make bench-tls measure what Ray's TLS costs the data path, on several hosts, as root"
	@echo "make up      start the embedded cluster and leave it running; also: make status, make down"
	@echo "make testbed build several hosts on this machine, as root, until Ctrl-C"
	@echo "make lint    the checks that run nothing"
	@echo "make gpu     add CuPy to .venv"
	@echo "make torch   add PyTorch to .venv, and train a network with it, on nodes and in the zone (TORCH=torch==2.13.0 for that one)"
	@echo "make head    add to .venv what a cluster's head needs besides: ray[default]"
	@echo "make lock    write constraints*.txt anew (UPGRADE=--upgrade for the newest versions)"
	@echo "make clean   remove .venv and caches"

demo: .venv/ready
	@$(BIN)/ray-gpu demo

test: lint
	@$(BIN)/python -m pytest --most-minutes 24

lint: .venv/ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

site: .venv/ready
	@$(BIN)/python -m mkdocs build --quiet --strict

chaos: .venv/ready
	@$(BIN)/python -m pytest -m chaos

client: .venv/ready
	@$(BIN)/python -m pytest --carrier client tests/job tests/proofs

attack: .venv/ready
	@$(BIN)/python -m attacks

bench: .venv/ready
	@$(BIN)/python -m benchmarks

adversary: .venv/ready
	@$(BIN)/python -m adversary

bench-tls: .venv/ready
	@scripts/testbed.sh
	@$(BIN)/python -m benchmarks.tls

testbed: .venv/ready
	@scripts/testbed.sh
	@$(BIN)/python -m testbed

up down status: .venv/ready
	@$(BIN)/ray-gpu $@

gpu head: .venv/ready
	@$(BIN)/python -m pip install -qq --root-user-action=ignore --require-hashes -r constraints-$@.txt

torch: .venv/ready
	@scripts/torch.sh $(TORCH)
	@$(BIN)/python -m pytest -rP tests/test_torch.py

lock:
	@scripts/lock.sh "$(or $(PYTHON),python3.11)" $(UPGRADE)

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

# Two stamps: a changed lock rebuilds .venv, a changed pyproject.toml only installs the project anew.
.venv/locked: constraints.txt scripts/setup.sh
	@scripts/setup.sh $(PYTHON)
	@touch $@

.venv/ready: .venv/locked pyproject.toml
	@$(BIN)/python -m pip install -qq --root-user-action=ignore --no-deps --no-build-isolation --editable .
	@touch $@
