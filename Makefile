# Two commands for a newcomer: `make demo` and `make test`. Both do all set-up by themselves.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# What `make setup` installs beside the package: dev, and for instance EXTRAS=dev,mpi
EXTRAS ?= dev
# A part of the tests: make test T=tests/data
T ?= tests
# Processes that tests are spread over; 0: one after another, for a machine that does something else
TEST_WORKERS ?= 2
# More options of `joy convert to-hf`, as ARGS='--precision fp8'
ARGS ?=

# The stages of the data pipeline, each with a small example of its own: data_pipeline/pipelines/stage_<name>.toml
STAGES := read extract clean pii decontaminate dedup score code chunk mix tokenise
STAGE_TARGETS := $(addprefix data-,$(STAGES))

.PHONY: help setup demo test lint bench data-demo data-verify data-report data-plan data-mixed convert-hf clean $(STAGE_TARGETS)

help: ## Show this list
	@echo "Megatron-Joy. Start with \`make demo\`; targets:"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  make data-STAGE   Run the example of one stage of the data pipeline:"
	@echo "                    $(STAGES)"

setup: $(STAMP) ## Create .venv with everything that the package and its tests need
	@echo "$(VENV) is ready; try $(BIN)/joy"

demo: $(STAMP) ## From raw text to a trained, killed, resumed, exported and writing small JoyAI, with a report
	@$(BIN)/python -m launch.demo

test: $(STAMP) ## Run every test, slow ones too (a part: make test T=tests/data)
	@$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadgroup $(T)

lint: $(STAMP) ## Check style and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: data-demo ## Run every benchmark in benchmarks/ (hours; each runs by itself as well)
	@for file in benchmarks/*.py benchmarks/data/*.py; do echo "== $$file"; $(BIN)/python "$$file"; done

convert-hf: $(STAMP) ## Export a checkpoint or run to Hugging Face's format: make convert-hf CKPT=runs/NAME OUT=hf/NAME
	@[ -n "$(CKPT)" ] && [ -n "$(OUT)" ] || { echo "convert-hf: name both, as make convert-hf CKPT=runs/NAME OUT=hf/NAME" >&2; exit 2; }
	@$(BIN)/joy convert to-hf "$(CKPT)" --out "$(OUT)" $(ARGS)

data-demo: $(STAMP) ## Run only the demo's data pipeline: text to tokens in data/demo
	@$(BIN)/joy data run data_pipeline/pipelines/demo.toml

data-verify: data-demo ## Check every count, checksum and token of the demo's shards
	@$(BIN)/joy data verify data/demo

data-report: data-demo ## Draw what became of every document of the demo's data
	@$(BIN)/joy data stats data/demo --html data/demo/report.html

data-plan: data-demo ## Extrapolate the demo's data run to 20 trillion tokens
	@$(BIN)/joy plan --data data_pipeline/pipelines/demo.toml

$(STAGE_TARGETS): data-%: data/stages/inputs
	@$(BIN)/joy data run stage_$* >/dev/null # stats says the same and more
	@$(BIN)/joy data stats data/stages/$*

# Under another name until it is whole: an interrupted one must not pass for inputs.
data/stages/inputs: | $(STAMP)
	@rm -rf $@.partial
	@$(BIN)/python tools/make_inputs.py --out $@.partial --megabytes 4
	@mv $@.partial $@

data-mixed: $(STAMP) ## From WARC, JSONL, parquet and sources to a trained model, killed twice on the way
	@$(BIN)/python benchmarks/data/mixed.py

clean: ## Remove .venv and what tools cached (not runs/, not data/)
	@rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info data_pipeline/native/*.so

# An environment whose interpreter no longer runs (a moved clone, a removed Python) is made anew.
# uv installs in a fraction of pip's time; it knows nothing of pip's configuration, so where it fails, pip is asked.
$(STAMP): setup.cfg setup.py pyproject.toml $(wildcard data_pipeline/native/*.[ch])
	@python=$$(tools/find_python.sh); \
	if ! $(BIN)/python -c '' 2>/dev/null; then \
		echo "creating $(VENV) with $$python"; \
		"$$python" -m venv --clear $(VENV) || uv venv --clear --seed --python "$$python" $(VENV); \
	fi
	@echo "installing the package and its dependencies into $(VENV) (once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv || true
	@if [ -x $(BIN)/uv ] && VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/uv pip install -e '.[$(EXTRAS)]'; then :; else \
		echo "uv could not install; asking pip"; \
		$(BIN)/python -m pip install --disable-pip-version-check -e '.[$(EXTRAS)]'; \
	fi
	@touch $@
