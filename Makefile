# x-msrv. `make` alone lists the targets; `make demo` and `make test` set up all that they need.
PYTHON = python3
ARGS =

V = .venv/bin
PINS = vendor/build.txt vendor/requirements.txt test/requirements.txt

# In the stamp's name, so that another PYTHON makes a new venv. Empty where PYTHON is missing or older than 3.11.
PYTHON_VERSION := $(shell $(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) and print("%d.%d" % v[:2])' 2>/dev/null)

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
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 16

venv: .venv/program-$(PYTHON_VERSION)  ## make .venv from the pins; the program is .venv/bin/x-msrv

nsq: build/bin/.built  ## build nsqd, nsqlookupd and the other NSQ tools into build/bin/

demo: venv nsq  ## messages from a real nsqd become records: see it work
	@$(V)/python test/demo

test: lint nsq shell-tools  ## lint, then the tests on the real nsqd; some minutes (ARGS='-k name' for some of them)
	@echo "running the tests"
	@$(V)/python -m pytest $(ARGS)

# The documents' commands publish by curl, and look by both.
shell-tools:
	@missing=; for tool in curl sqlite3; do command -v $$tool >/dev/null || missing="$$missing $$tool"; done; \
	[ -z "$$missing" ] || $(call apt,$$missing) || $(call stop,some tools are missing here: apt-get install$$missing)

test-web: venv nsq  ## the daemon's page in chromium; pictures of it in build/page
	@command -v chromium >/dev/null || $(call apt,chromium) || $(call stop,no chromium on PATH: apt-get install chromium)
	@$(V)/python -m pytest -n 0 test/web $(ARGS)

test-monitoring: venv  ## the alert rules, the dashboard's queries and the metrics, by promtool
	@command -v promtool >/dev/null || $(call apt,prometheus) || $(call stop,no promtool on PATH: apt-get install prometheus)
	@$(V)/python -m pytest -n 0 test/monitoring $(ARGS)

lint: venv  ## ruff and mypy
	@echo "checking the code: ruff, mypy"
	@$(V)/ruff check --quiet
	@$(V)/mypy --no-error-summary

mutants: venv nsq  ## do the tests notice? Each wrong line of test/mutants.py has to fail some (ARGS=fsync for some of them)
	@mkdir -p build && $(V)/python test/mutants.py $(ARGS)

bench: venv nsq  ## what it costs, against the obvious version (AEROSPIKE=host:port for its part, on a real server)
	@$(V)/python bench/bench.py $(if $(AEROSPIKE),--aerospike $(AEROSPIKE)) $(ARGS)

soak: venv nsq  ## ten minutes of a daemon's life, with outages (ARGS='--minutes 60')
	@$(V)/python bench/soak.py $(ARGS)

pins:  ## work out the versions and hashes anew from the *.in files, for every Python from 3.11 on
	@$(PYTHON) -m venv build/pins
	@build/pins/bin/python -m pip --quiet --disable-pip-version-check install uv==0.13.9
	@set -e; pin() { \
	    build/pins/bin/uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes --no-header \
	        --no-emit-index-url --no-emit-find-links --python build/pins/bin/python --output-file $$1.txt $$1.in $$2 $$3; }; \
	pin vendor/build; pin vendor/requirements; pin test/packages/schemas; \
	pin test/requirements --constraint=vendor/build.txt --constraint=vendor/requirements.txt

clean:  ## remove all that make made
	rm -rf build dist .venv

# The stamps are written last and moved into place, so that what was cut short is done again.
.venv/pins-$(PYTHON_VERSION): $(PINS)
	@[ -n "$(PYTHON_VERSION)" ] || $(call stop,$(PYTHON) is missing or older than 3.11: apt-get install python3 python3-venv$(comma) or name one with PYTHON=)
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

# --- packages: `make vendor` needs the network, `make deb rpm` after it does not

HOST_ARCH := $(if $(filter aarch64,$(shell uname -m)),arm64,amd64)
ARCH = $(HOST_ARCH)
DIST = dist
STAGE = build/stage
RPM_ARCH = $(if $(filter arm64,$(ARCH)),aarch64,x86_64)
STRIP = $(if $(filter $(shell uname -m),$(RPM_ARCH)),strip,$(RPM_ARCH)-linux-gnu-strip)
BINUTILS = $(if $(filter strip,$(STRIP)),binutils,binutils-$(RPM_ARCH)-linux-gnu)

vendor: build/vendor/.$(ARCH)  ## bring the libraries that the packages carry, and say which they are (ARCH=arm64)
	@cat build/vendor/$(ARCH).txt

deb: build/vendor/.$(ARCH)  ## build dist/*.deb
	@missing=; for pair in dh:debhelper dh_python3:dh-python; do \
		command -v $${pair%%:*} >/dev/null || missing="$$missing $${pair##*:}"; done; \
	[ -z "$$missing" ] || $(call apt,$$missing) || $(call stop,some tools are missing here: apt-get install$$missing)
	@set -e; umask 022; rm -rf $(STAGE)/deb; set -- $$($(PYTHON) packaging/stage.py $(ARCH) $(STAGE)/deb/x-msrv); \
		export SOURCE_DATE_EPOCH=$$2; \
		(cd $(STAGE)/deb/x-msrv && dpkg-buildpackage --build=binary --no-sign --no-check-builddeps --host-arch=$(ARCH)) \
			>$(STAGE)/deb.log 2>&1 || { cat $(STAGE)/deb.log >&2; exit 1; }; \
		mkdir -p $(DIST); mv $(STAGE)/deb/*.deb $(DIST); echo $(DIST)/x-msrv_$$1-1_$(ARCH).deb

rpm: build/vendor/.$(ARCH)  ## build dist/*.rpm
	@command -v rpmbuild >/dev/null || $(call apt,rpm) || $(call stop,no rpmbuild here: apt-get install rpm)
	@set -e; umask 022; rm -rf $(STAGE)/rpm; set -- $$($(PYTHON) packaging/stage.py $(ARCH) $(STAGE)/rpm/x-msrv); \
		export SOURCE_DATE_EPOCH=$$2; cd $(STAGE)/rpm; mv x-msrv x-msrv-$$1; mkdir -p SOURCES; \
		tar -cf SOURCES/x-msrv-$$1.tar x-msrv-$$1; \
		rpmbuild -bb --target $(RPM_ARCH)-linux --define "_topdir $$PWD" --define "x_version $$1" \
			--define 'deb_arch $(ARCH)' x-msrv-$$1/rpm/x-msrv.spec >../rpm.log 2>&1 || { cat ../rpm.log >&2; exit 1; }; \
		cd $(CURDIR); mkdir -p $(DIST); mv $(STAGE)/rpm/RPMS/*/*.rpm $(DIST); echo $(DIST)/x-msrv-$$1-1.$(RPM_ARCH).rpm

# The image of the package in dist/: its base, and the tool that builds it, the first of these that is here.
BASE = debian:trixie-slim
BUILDER = $(notdir $(firstword $(shell command -v docker buildah podman)))
IMAGE = x-msrv
VERSION = $(shell sed -n "s/^__version__ = '\(.*\)'/\1/p" xmsrv.py)

image: deb  ## build a container image, $(IMAGE):VERSION, by docker, buildah or podman (BUILDER=buildah BASE=debian:bookworm-slim)
	@[ -n "$(BUILDER)" ] || $(call stop,neither docker nor buildah nor podman here: apt-get install buildah)
	@$(BUILDER) build $(if $(filter docker,$(BUILDER)),,--format docker) --file Containerfile --platform linux/$(ARCH) \
		--build-arg BASE=$(BASE) --build-arg VERSION='$(VERSION)-*' --tag $(IMAGE):$(VERSION) --tag $(IMAGE):latest .

# Schemas of Kubernetes and compose files, for the tests of both, in a venv of their own: nothing else needs them.
build/schemas/.made: test/packages/schemas.txt
	@rm -rf build/schemas && $(PYTHON) -m venv build/schemas
	@build/schemas/bin/python -m pip --quiet --disable-pip-version-check --no-input install --require-hashes -r $<
	@touch $@.new && mv $@.new $@

test-image: venv nsq deb image-tools build/schemas/.made  ## the image: built from nothing, a window in it; the examples for Kubernetes
	@XMSRV_PACKAGES=1 $(V)/python -m pytest -n 1 --timeout 600 test/packages/test_image.py $(ARGS)

image-tools:
	@missing=; for pair in buildah:buildah mmdebstrap:mmdebstrap unshare:util-linux; do \
		command -v $${pair%%:*} >/dev/null || missing="$$missing $${pair##*:}"; done; \
	[ -z "$$missing" ] || $(call apt,$$missing) || $(call stop,some tools are missing here: apt-get install$$missing)

test-packages: venv nsq deb rpm guests image-tools build/schemas/.made  ## what the packages hold, reproducible builds, lintian; and both on booted systems
	@missing=; for pair in lintian:lintian rpmlint:rpmlint mandoc:mandoc cpio:cpio uscan:devscripts autopkgtest:autopkgtest; do \
		command -v $${pair%%:*} >/dev/null || missing="$$missing $${pair##*:}"; done; \
	[ -z "$$missing" ] || $(call apt,$$missing) || $(call stop,some tools are missing here: apt-get install$$missing)
	@XMSRV_PACKAGES=1 $(V)/python -m pytest -n 2 --dist loadgroup --timeout 600 test/packages $(ARGS)

# What boots Debian systems here: their roots, their repositories, Vagrant's syntax.
guests:
	@missing=; for pair in systemd-nspawn:systemd-container mmdebstrap:mmdebstrap dpkg-scanpackages:dpkg-dev \
			createrepo_c:createrepo-c rpmbuild:rpm vagrant:vagrant; do \
		command -v $${pair%%:*} >/dev/null || missing="$$missing $${pair##*:}"; done; \
	[ -z "$$missing" ] || $(call apt,$$missing) || $(call stop,some tools are missing here: apt-get install$$missing)

man: venv  ## write the option list of x-msrv.conf(5) anew, from the table of options
	@$(V)/python man/options.py man/x-msrv.conf.5

# What both packages are made of. The libraries are those of `make vendor`.
PROGRAM = $(DESTDIR)/usr/share/x-msrv
LIB = $(DESTDIR)/usr/lib/x-msrv
MANDIR = /usr/share/man
DOCDIR = /usr/share/doc/x-msrv
UNITDIR = /usr/lib/systemd/system
RUNITDIR = /etc/sv/x-msrv
BASHDIR = /usr/share/bash-completion/completions
ZSHDIR = /usr/share/zsh/vendor-completions
FISHDIR = /usr/share/fish/vendor_completions.d
VENDOR = build/vendor/$(ARCH)
put = umask 022 && install -D -m $(1)

install:  ## put all files below DESTDIR=, as the packages have them
	@[ -d $(VENDOR) ] || $(call stop,no $(VENDOR): make vendor)
	$(call put,755) bin/x-msrv $(DESTDIR)/usr/bin/x-msrv
	$(call put,755) packaging/maintain $(LIB)/maintain
	$(call put,644) packaging/__main__.py $(PROGRAM)/__main__.py
	$(call put,644) xmsrv.py $(PROGRAM)/xmsrv.py
	umask 022 && cp -R $(VENDOR)/. $(LIB) && chmod -R u=rwX,go=rX $(LIB)
	$(call put,640) etc/x-msrv.conf $(DESTDIR)/etc/x-msrv/x-msrv.conf
	umask 022 && install -D -m 644 -t $(DESTDIR)$(UNITDIR) systemd/*.service systemd/*.timer
	$(call put,644) systemd/x-msrv.sysusers $(DESTDIR)/usr/lib/sysusers.d/x-msrv.conf
	$(call put,644) systemd/x-msrv.tmpfiles $(DESTDIR)/usr/lib/tmpfiles.d/x-msrv.conf
	$(call put,755) runit/run $(DESTDIR)$(RUNITDIR)/run
	$(call put,755) runit/finish $(DESTDIR)$(RUNITDIR)/finish
	$(call put,755) runit/log/run $(DESTDIR)$(RUNITDIR)/log/run
	$(call put,644) man/x-msrv.8 $(DESTDIR)$(MANDIR)/man8/x-msrv.8
	$(call put,644) man/x-msrv.conf.5 $(DESTDIR)$(MANDIR)/man5/x-msrv.conf.5
	$(call put,644) build/vendor/$(ARCH).txt $(DESTDIR)$(DOCDIR)/libraries.txt
	umask 022 && install -D -m 644 -t $(DESTDIR)$(DOCDIR)/examples etc/x-msrv-*.conf
	umask 022 && install -D -m 644 -t $(DESTDIR)$(DOCDIR)/examples/kubernetes kubernetes/*.yaml
	[ ! -d monitoring ] || (umask 022 && install -D -m 644 -t $(DESTDIR)$(DOCDIR)/examples/monitoring \
		$$(find monitoring -maxdepth 1 -type f))
	$(call complete,bash,$(DESTDIR)$(BASHDIR)/x-msrv)
	$(call complete,zsh,$(DESTDIR)$(ZSHDIR)/_x-msrv)
	$(call complete,fish,$(DESTDIR)$(FISHDIR)/x-msrv.fish)

# The extensions are for $(ARCH); the state directory is the builder's own, for that of the package is not there yet.
installcheck:  ## does the program run below DESTDIR=, with the libraries that are there?
	@[ -n "$(filter $(ARCH),$(HOST_ARCH))" ] || { echo "not checked: $(ARCH) does not run here"; exit 0; } && \
		$(PYTHON) -I -S -B $(PROGRAM) --as-root -c $(DESTDIR)/etc/x-msrv/x-msrv.conf --set state-dir=$(CURDIR) check

# The program prints its completions itself.
complete = PYTHONPATH=$(VENDOR) $(PYTHON) xmsrv.py completion $(1) >build/completion && $(call put,644) build/completion $(2)

build/vendor/.$(ARCH): vendor/build.txt vendor/requirements.txt packaging/libraries.py
	@[ -n "$(PYTHON_VERSION)" ] || $(call stop,$(PYTHON) is missing or older than 3.11)
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || $(call apt,python3-venv) || $(call stop,$(PYTHON) has no venv module: apt-get install python3-venv)
	@command -v $(STRIP) >/dev/null || $(call apt,$(BINUTILS)) || $(call stop,no $(STRIP) here: apt-get install $(BINUTILS))
	@echo "bringing the libraries for $(ARCH)"
	@rm -rf build/vendor/venv && $(PYTHON) -m venv build/vendor/venv
	@build/vendor/venv/bin/python -m pip --quiet --disable-pip-version-check --no-input install --require-hashes -r vendor/build.txt
	@$(PYTHON) packaging/libraries.py $(ARCH) build/vendor/venv $(VENDOR) >/dev/null
	@touch $@.new && mv $@.new $@

comma = ,
.DELETE_ON_ERROR:
.PHONY: help venv nsq demo test shell-tools test-web test-monitoring lint mutants bench soak pins clean vendor deb rpm test-packages man \
	install installcheck guests image image-tools test-image
