# Two commands on a fresh machine with python3 and pip: `make quickstart` and `make test`.
PYTHON ?= python3
VENV ?= .venv
LOWEST ?= .venv-lowest
RUN = $(VENV)/bin/python -m

# The environment is built from nothing when its recipe or the Python version changes.
KEY := $(shell $(PYTHON) -c "import hashlib, sys; \
	recipe = b''.join(open(name, 'rb').read() for name in ('pyproject.toml', 'constraints.txt')); \
	print(hashlib.sha256(recipe + sys.version.encode()).hexdigest()[:16])")
READY := $(VENV)/.ready-$(KEY)
PAGE_MODELS := web/public/models/models.json
# Which checkout the environment's `visionattn` points to.
LINKED := $(VENV)/.linked-$(shell printf '%s' '$(CURDIR)' | cksum | cut -d ' ' -f 1)

.PHONY: quickstart test pytest test-export test-lowest lint types docs wheel clean environment-key ffmpeg browser web

quickstart: $(LINKED)
	$(VENV)/bin/visionattn quickstart

# mypy keeps one core busy for the half minute that it takes without its cache: the tests need not wait for it.
test: lint
	@$(MAKE) --no-print-directory --jobs 2 types pytest

pytest: $(LINKED)
	$(RUN) pytest --numprocesses 2 --dist worksteal

# Every name of the zoo as an ONNX file, checked.
test-export: $(LINKED)
	$(RUN) pytest -m slow tests/export/test_zoo.py --numprocesses 2 --dist worksteal

# The suite with the lowest versions that pyproject.toml allows, in an environment of its own (several GB).
test-lowest: $(LINKED)
	$(RUN) pip install --quiet uv
	$(RUN) uv venv --quiet --clear $(LOWEST)
	$(RUN) uv pip compile --quiet --resolution lowest-direct --extra all --group dev pyproject.toml -o $(LOWEST)/versions.txt
	$(RUN) uv pip install --quiet --python $(LOWEST) --requirement $(LOWEST)/versions.txt
	$(RUN) uv pip install --quiet --python $(LOWEST) --no-deps --editable .
	$(LOWEST)/bin/python -m pytest --numprocesses 2 --dist worksteal

lint: $(LINKED)
	$(RUN) ruff check .
	$(RUN) ruff format --check .

types: $(LINKED)
	$(RUN) mypy

docs: $(LINKED)
	$(RUN) mkdocs build --strict

wheel: $(LINKED)
	$(RUN) build

# Programs that some tests need: without them these tests skip. Where they cannot be installed, nothing fails.
define install
{ [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1 && export DEBIAN_FRONTEND=noninteractive && \
timeout 240 apt-get update -qq && timeout 240 apt-get install -y -qq --no-install-recommends $(1); }
endef

ffmpeg:
	@command -v ffmpeg >/dev/null 2>&1 || $(call install,ffmpeg) || \
	echo "ffmpeg could not be installed: tests on real videos skip."

browser:
	@command -v chromium >/dev/null 2>&1 || $(call install,chromium) || \
	echo "Chromium could not be installed: tests of the page skip."
	@command -v npm >/dev/null 2>&1 || $(call install,nodejs npm) || \
	echo "Node could not be installed: the page cannot be built, and its tests skip."

# The page of `visionattn demo`. Node 20 or newer is needed to build it, and nothing but files to use it.
web: web/node_modules/.package-lock.json $(PAGE_MODELS)
	cd web && npm run --silent build
	$(RUN) tools.compress_page visionattn/demo/page

$(PAGE_MODELS): tools/page_models.py tools/external_weights.py visionattn/export/half.py $(wildcard visionattn/weights/*.safetensors visionattn/demo/*.safetensors) | $(LINKED)
	$(RUN) tools.page_models web/public

web/node_modules/.package-lock.json: web/package-lock.json
	@command -v npm >/dev/null 2>&1 || { echo "make web needs Node 20 or newer, with npm."; exit 1; }
	cd web && npm ci --silent --no-audit --no-fund
	touch $@

clean:
	rm -rf $(VENV) dist site visionattn/demo/page web/node_modules web/public/models web/public/examples

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
