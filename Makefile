# Everything a developer runs. Each environment is a folder of its own, created on the first use and again when its
# requirements change; nothing outside this folder is touched.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test check docs bench stress lowest other dist clean

# The first Python that is new enough and can create environments; PYTHON=… chooses another.
PYTHON ?=
can_build := import sys, venv, ensurepip; assert sys.version_info >= (3, 11)
python := $(firstword $(foreach name,$(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11),\
	$(shell $(name) -c '$(can_build)' 2>/dev/null && echo $(name))))
version := $(if $(python),$(shell $(python) -c 'import platform; print(platform.python_version())'))

PORT ?= 8000
export REDIS_URL
ARGS ?=
SHARE ?= 1

# What a build reads, besides the modules.
project := setup.cfg setup.py pyproject.toml

# The contents of the sdist; the wheel has only the first of these.
shipped := flask_asyncroute flask_asyncroute_pytest.py benchmarks docs example_app requirements tests \
	CHANGES.rst LICENSE MANIFEST.in Makefile README.rst $(project)
sources = find $(wildcard $(1)) -type f ! -path '*/__pycache__/*' ! -path 'docs/_build/*' ! -name '*.db*' | sort

define make_environment
$(if $(python),,$(error No usable $(or $(PYTHON),python3). \
	Python 3.11 or newer with its venv module is needed (on Debian and Ubuntu: apt-get install python3-venv); \
	for another name: make $(MAKECMDGOALS) PYTHON=/path/to/python3))
$(python) -m venv --clear $(@D)
$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --requirement $<
$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
@touch $@
endef

help:  ## list these targets
	@sed -n 's/^\([a-z-]*\):.*  ## /\1\t/p' $(MAKEFILE_LIST) | while IFS="$$(printf '\t')" read -r name text; do \
		printf '  make %-12s %s\n' "$$name" "$$text"; done

demo: .venv-demo/.made  ## serve the example application on http://127.0.0.1:8000/ (PORT=… for another port)
	@echo "The example application: http://127.0.0.1:$(PORT)/ (Ctrl-C stops it)"
	.venv-demo/bin/python -m gunicorn --config python:example_app.server --workers 4 --threads 4 \
		--bind 127.0.0.1:$(PORT) --no-control-socket 'example_app:create_app()'

.PHONY: demo-celery
demo-celery: .venv-demo-celery/.made  ## serve it with a Celery worker too, on the Redis that runs (REDIS_URL=… for another)
	@.venv-demo-celery/bin/python -m example_app.with_celery $(PORT)

test: .venv/.made  ## run all tests except the long trials (ARGS="-k name" for some of them)
	.venv/bin/python -m pytest $(ARGS)

.PHONY: integrations
integrations: .venv-integrations/.made  ## run the tests with the extensions of other authors
	.venv-integrations/bin/python -m pytest tests/integrations \
		tests/test_docs.py::test_python_in_the_pages_runs $(ARGS)

check: .venv/.made  ## check style, types, the order of the modules, and that the documentation builds
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m mypy
	.venv/bin/python -m pytest --quiet tests/test_architecture.py
	$(MAKE) --no-print-directory docs

docs: .venv/.made  ## build the documentation in docs/_build/html
	.venv/bin/python -m sphinx --quiet --fail-on-warning --keep-going --builder html docs docs/_build/html

bench: .venv/.made  ## measure requests beside a plain view, lists, stops and killed workers (takes about 4 minutes)
	.venv/bin/python -m benchmarks $(ARGS)

.PHONY: peers
peers: .venv-peers/.made  ## measure whole tasks beside other task queues (takes about 15 minutes)
	.venv-peers/bin/python -m benchmarks.peers $(ARGS)

stress: .venv/.made  ## run the long trials: races, kills, floods (SHARE=0.05 for a twentieth of each)
	.venv/bin/python -m pytest -m stress --share $(SHARE) tests/stress $(ARGS)

lowest: .venv-lowest/.made  ## run the tests that need no server with the oldest versions that setup.cfg allows
	.venv-lowest/bin/python -m pytest -m "not live and not stress" $(ARGS)

other: .venv-$(version)/.made  ## run the tests that need no server on another Python (PYTHON=python3.13 or a path)
	.venv-$(version)/bin/python -m pytest -m "not live and not stress" $(ARGS)

dist: .venv/.made  ## build sdist and wheel in dist/ and compare their contents with the source
	rm -rf build dist *.egg-info
	.venv/bin/python -m build --outdir dist .
	@mkdir -p build
	@$(call sources,flask_asyncroute flask_asyncroute_pytest.py) >build/wheel.wanted
	@.venv/bin/python -m zipfile --list dist/*.whl | awk 'NR > 1 && $$1 !~ /dist-info/ {print $$1}' | sort >build/wheel.found
	diff build/wheel.wanted build/wheel.found
	@$(call sources,$(shipped)) >build/sdist.wanted
	@tar -tf dist/*.tar.gz | cut -d/ -f2- | grep -v -e '/$$' -e '^$$' -e '^PKG-INFO$$' -e '^[^/]*egg-info/' | sort >build/sdist.found
	diff build/sdist.wanted build/sdist.found
	@ls -l dist

clean:  ## remove the environments and everything that was built
	rm -rf .venv .venv-* .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache
	rm -rf build dist docs/_build *.egg-info

.venv/.made: requirements/dev.txt $(project)
	$(make_environment)

.venv-integrations/.made: requirements/integrations.txt $(project)
	$(make_environment)

.venv-peers/.made: requirements/peers.txt $(project)
	$(make_environment)

.venv-demo/.made: requirements/demo.txt $(project)
	$(make_environment)

.venv-demo-celery/.made: requirements/demo-celery.txt $(project)
	$(make_environment)

.venv-lowest/.made: requirements/lowest.txt $(project)
	$(make_environment)

.venv-$(version)/.made: requirements/dev.txt $(project)
	$(make_environment)
