# x-msrv. `make` alone lists the targets; `make demo` and `make test` set up all that they need.
PYTHON = python3
ARGS =

V = .venv/bin
PINS = vendor/build.txt vendor/requirements.txt test/requirements.txt

# In the stamp's name, so that another PYTHON makes a new venv. Empty where PYTHON is missing or older than 3.10.
PYTHON_VERSION := $(shell $(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 10) and print("%d.%d" % v[:2])' 2>/dev/null)

# The pins alone decide what is imported, and no bytecode is left beside the sources (pip compiles what it installs).
unexport PYTHONHOME PYTHONPATH
export PYTHONDONTWRITEBYTECODE = 1
PIP = $(V)/python -m pip --quiet --disable-pip-version-check --no-input
PIP_INSTALL = $(PIP) install --use-pep517 --no-build-isolation --no-warn-script-location

# A command that installs a package of Debian's, and fails where that is not for us to do.
apt = { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && echo "installing $(1) with apt-get" && \
	apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq -y install --no-install-recommends $(1) >/dev/null; }
# The end of a recipe that can't go on: one line that says what to do.
stop = { echo "make: $(1)" >&2; exit 1; }

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | expand -t 10

venv: .venv/program-$(PYTHON_VERSION)  ## make .venv from the pins; the program is .venv/bin/x-msrv

nsq: build/bin/.built  ## build nsqd, nsqlookupd and the other NSQ tools into build/bin/

demo: venv nsq  ## messages from a real nsqd become records: see it work
	@$(V)/python test/demo

test: lint nsq  ## lint, then every test on the real nsqd (ARGS='-k name' for some of them)
	@$(V)/python -m pytest $(ARGS)

lint: venv  ## ruff
	@$(V)/ruff check --quiet

bench: venv nsq  ## what it costs, against the obvious version (AEROSPIKE=host:port for its part, on a real server)
	@$(V)/python bench/bench.py $(if $(AEROSPIKE),--aerospike $(AEROSPIKE)) $(ARGS)

pins:  ## work out the versions and hashes anew from the *.in files, for every Python from 3.10 on
	@$(PYTHON) -m venv build/pins
	@build/pins/bin/python -m pip --quiet --disable-pip-version-check install uv==0.13.9
	@set -e; pin() { \
	    build/pins/bin/uv pip compile --quiet --upgrade --universal --python-version 3.10 --generate-hashes --no-header \
	        --no-emit-index-url --no-emit-find-links --python build/pins/bin/python --output-file $$1.txt $$1.in $$2 $$3; }; \
	pin vendor/build; pin vendor/requirements; pin test/requirements --constraint=vendor/build.txt --constraint=vendor/requirements.txt

clean:  ## remove all that make made
	rm -rf build .venv

# The stamps are written last and moved into place, so that what was cut short is done again.
.venv/pins-$(PYTHON_VERSION): $(PINS)
	@[ -n "$(PYTHON_VERSION)" ] || $(call stop,$(PYTHON) is missing or older than 3.10: apt-get install python3 python3-venv$(comma) or name one with PYTHON=)
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || $(call apt,python3-venv) || true
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || $(call stop,$(PYTHON) has no venv module: apt-get install python3-venv)
	@echo "making .venv with Python $(PYTHON_VERSION)"
	@rm -rf .venv && $(PYTHON) -m venv .venv
	@$(PIP) install --require-hashes -r vendor/build.txt
	@$(PIP_INSTALL) --require-hashes -r vendor/requirements.txt -r test/requirements.txt
	@touch $@.new && mv $@.new $@

# Wheels of ours carry no number that changes with each edit, hence --force-reinstall; all they need is there, hence no index.
.venv/program-$(PYTHON_VERSION): .venv/pins-$(PYTHON_VERSION) xmsrv.py setup.py
	@rm -rf build/setuptools
	@$(PIP_INSTALL) --no-index --no-deps --force-reinstall .
	@touch $@.new && mv $@.new $@

# go.sum decides what is built (-mod=readonly); no C compiler is needed (CGO_ENABLED=0).
build/bin/.built: test/nsq/go.mod test/nsq/go.sum test/nsq/tools.go
	@command -v go >/dev/null || $(call apt,golang-go ca-certificates) || $(call stop,no go on PATH: apt-get install golang-go$(comma) or any Go from 1.19 on)
	@echo "building the NSQ tools"
	@mkdir -p build/bin
	@cd test/nsq && GOBIN=$(CURDIR)/build/bin GOFLAGS='-mod=readonly -trimpath' GO111MODULE=on GOWORK=off CGO_ENABLED=0 \
		go install github.com/nsqio/nsq/apps/...
	@touch $@.new && mv $@.new $@

comma = ,
.DELETE_ON_ERROR:
.PHONY: help venv nsq demo test lint bench pins clean
