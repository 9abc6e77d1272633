# From a fresh clone: `make quickstart` runs the tool end to end, `make test` checks the tree.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.PHONY: quickstart test test-faults test-fuzz launchers lint format clean

PYTHON ?= python3
PIP := .venv/bin/pip --disable-pip-version-check install --constraint constraints.txt
TORCH := $(shell grep '^torch==' constraints.txt)
# Threads that spin while they wait are ten times slower as soon as anything else runs on the cores.
export OMP_WAIT_POLICY ?= PASSIVE
export PATH := $(CURDIR)/.venv/bin:$(PATH)

# Two ranks, on the GPUs if there are any; a single GPU takes one rank.
quickstart: .venv/.installed
	@read -r gpus port < <(python -c 'import socket, torch; print(torch.cuda.device_count(), socket.create_server(("", 0)).getsockname()[1])')
	if (( gpus == 0 )); then export DS_ACCELERATOR=cpu; fi
	set -x
	python launch/quickstart.py
	deepspeed --num_gpus $$(( gpus == 1 ? 1 : 2 )) --master_port "$$port" \
	    launch/init.py --config configs/quickstart.yaml --overwrite

test: lint launchers
	pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# More of the kills that `make test` has a few of; half an hour.
test-faults: .venv/.installed-dev
	pytest tests/faults/test_kills.py --kills 200 --timeout 900

# More of the wrong inputs that `make test` tries a few of; half an hour.
test-fuzz: .venv/.installed-dev
	pytest tests/fuzz --fuzz 5000 --numprocesses 2 --dist load --timeout 7200

# SLURM for tests/launchers, where we may install it; elsewhere its tests are skipped and say why.
launchers:
	@missing=()
	for pair in sbatch:slurm-wlm munged:munge ip:iproute2; do
	    command -v "$${pair%%:*}" > /dev/null || missing+=("$${pair##*:}")
	done
	if (( EUID == 0 && $${#missing[@]} )) && command -v apt-get > /dev/null; then
	    { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends "$${missing[@]}"; } \
	        || echo "could not install $${missing[*]}: tests that need them are skipped" >&2
	fi

lint: .venv/.installed-dev
	ruff check
	ruff format --check
	pyright

format: .venv/.installed-dev
	ruff check --fix
	ruff format

clean:
	rm -rf build runs .pytest_cache .ruff_cache

.venv/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "$(PYTHON) is too old: install Python 3.11 or newer, or name one: make PYTHON=...")'
	if ! $(PYTHON) -c 'import ensurepip, venv' 2> /dev/null; then
	    if (( EUID )); then echo "$(PYTHON) lacks venv; run: sudo apt-get install python3-venv" >&2; exit 1; fi
	    apt-get update && apt-get install --yes --no-install-recommends python3-venv
	fi
	$(PYTHON) -m venv .venv
	touch $@

# torch comes first, so that nothing below chooses another build of it.
.venv/.installed: .venv/.created pyproject.toml constraints.txt
	$(PIP) $(TORCH)
	$(PIP) --editable '.[distributed,data,plots]'
	touch $@

.venv/.installed-dev: .venv/.installed
	$(PIP) --editable '.[distributed,data,plots,dev]'
	touch $@
