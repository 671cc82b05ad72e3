.DEFAULT_GOAL := help
.PHONY: help demo test test-system check proto test-gpu figures docs manifests baseline clean

PYTHON ?= python3
# Where pip finds a CPU build of torch, if the default index has only CUDA builds,
# for example https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export PATH := $(CURDIR)/$(BIN):$(PATH)
SITE_PACKAGES = $(shell $(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
PROTOC = $(BIN)/python -m grpc_tools.protoc --proto_path=proto --proto_path=$(SITE_PACKAGES)

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

$(READY): pyproject.toml constraints-cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "lorry needs Python 3.11 or newer: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints-cpu.txt \
		$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) \
		--editable '.[router,adapter-store,worker,client,bench,dev]'
	touch $@

demo: $(READY) ## serve eight adapters on this machine and check every answer
	$(BIN)/python -m demo.run

test: $(READY) .cache/redis-server ## all tests that need neither a GPU nor root
	TRITON_INTERPRET=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

test-system: $(READY) ## real containers, and clients in other languages; as root it installs what they need
	tests/containers/prepare.sh
	$(BIN)/python -m pytest tests/containers tests/stubs --timeout=1800 --durations=10 $(PYTEST_ARGS)

test-gpu: ## the tests of tests/gpu with this machine's own torch; fails without a GPU
	PYTHONPATH=adapter_store:client:kernels:proto/python:router:worker:. \
		$(PYTHON) -m pytest tests/gpu -c /dev/null --rootdir . --import-mode=importlib \
		-p no:cacheprovider $(PYTEST_ARGS)

OVERLAYS := $(notdir $(wildcard deploy/kubernetes/overlays/*))
manifests: $(READY) ## render deploy/kubernetes/rendered from the overlays
	$(foreach overlay,$(OVERLAYS),$(BIN)/kubectl kustomize deploy/kubernetes/overlays/$(overlay) \
		> deploy/kubernetes/rendered/$(overlay).yaml &&) true

check: $(READY) .cache/third_party/google/rpc/status.proto ## linters, type checkers, protos
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pyright
	$(BIN)/buf lint
	$(BIN)/buf format -d --exit-code
	$(BIN)/buf breaking proto --against proto/baseline.binpb
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker-compose.yml \
		docker-compose.redis.yml
	sed -E 's/: !(reset|override)/:/' docker-compose.cpu.yml | $(BIN)/check-jsonschema \
		--builtin-schema vendor.compose-spec --default-filetype yaml -
	$(foreach overlay,$(OVERLAYS),$(BIN)/kubectl kustomize deploy/kubernetes/overlays/$(overlay) \
		| diff deploy/kubernetes/rendered/$(overlay).yaml - &&) true
	$(BIN)/kubernetes-validate --strict -k 1.34.0 deploy/kubernetes/rendered/*.yaml
	rm -rf .cache/proto && mkdir -p .cache/proto
	$(PROTOC) --python_out=.cache/proto --grpc_python_out=.cache/proto \
		--mypy_out=.cache/proto --mypy_grpc_out=.cache/proto proto/lorry/v1/*.proto
	diff -r --exclude=__pycache__ --exclude=py.typed .cache/proto/lorry/v1 proto/python/lorry/v1

proto: $(READY) ## regenerate proto/python/lorry/v1
	rm -f proto/python/lorry/v1/*_pb2*
	$(PROTOC) --python_out=proto/python --grpc_python_out=proto/python \
		--mypy_out=proto/python --mypy_grpc_out=proto/python proto/lorry/v1/*.proto

figures: $(READY) ## write README's measurements from benchmarks/results
	$(BIN)/python -m benchmarks.figures

docs: $(READY) ## write docs/metrics.md and the errors of docs/faults.md from the services' tables
	$(BIN)/python -m deploy.metrics_page
	$(BIN)/python -m deploy.errors_table

baseline: .cache/third_party/google/rpc/status.proto ## at a release only: what buf breaking compares with
	$(BIN)/buf build proto -o proto/baseline.binpb

.cache/third_party/google/rpc/status.proto: $(READY)
	mkdir -p $(@D) && cp $(SITE_PACKAGES)/google/rpc/status.proto $@

.cache/redis-server: tests/support/get_redis.sh
	sh $< $@

clean: ## remove what the other targets made
	rm -rf $(VENV) .cache
