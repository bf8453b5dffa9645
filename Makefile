# Two commands on a fresh machine with python3 and pip: `make quickstart` and `make test`.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python -m

# The environment is built from nothing when its recipe or the Python version changes.
KEY := $(shell $(PYTHON) -c "import hashlib, sys; \
	recipe = b''.join(open(name, 'rb').read() for name in ('pyproject.toml', 'constraints.txt')); \
	print(hashlib.sha256(recipe + sys.version.encode()).hexdigest()[:16])")
READY := $(VENV)/.ready-$(KEY)
# Which checkout the environment's `visionattn` points to.
LINKED := $(VENV)/.linked-$(shell printf '%s' '$(CURDIR)' | cksum | cut -d ' ' -f 1)

.PHONY: quickstart test lint types docs wheel clean environment-key

quickstart: $(LINKED)
	$(VENV)/bin/visionattn quickstart

test: lint types
	$(RUN) pytest

lint: $(LINKED)
	$(RUN) ruff check .
	$(RUN) ruff format --check .

types: $(LINKED)
	$(RUN) mypy

docs: $(LINKED)
	$(RUN) mkdocs build --strict

wheel: $(LINKED)
	$(RUN) build

clean:
	rm -rf $(VENV) dist site

environment-key:
	@echo $(KEY)

$(READY):
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(RUN) pip install --quiet --constraint constraints.txt --upgrade pip  # one that knows dependency groups
	$(RUN) pip install --quiet --constraint constraints.txt --editable '.[all]' --group dev
	touch $@

$(LINKED): $(READY)
	@if ls $(VENV)/.linked-* >/dev/null 2>&1; then $(RUN) pip install --quiet --no-deps --editable .; fi
	@rm -f $(VENV)/.linked-*
	@touch $@
