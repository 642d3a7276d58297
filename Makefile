# make demo: see it work. make test: everything CI checks. The parts: make check,
# make molecule SCENARIO=name. make bench: the figures. Everything is installed into .venv and .cache, except
# the Debian packages that run the test hosts.
SHELL := /bin/bash
.DEFAULT_GOAL := help

export ZEG_CACHE := $(CURDIR)/.cache
export CONTAINERS_CONF = $(shell test -s .cache/containers.conf && echo $(CURDIR)/.cache/containers.conf)
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export ANSIBLE_CONFIG := $(CURDIR)/ansible.cfg
PACKAGES := podman runc conmon netavark aardvark-dns iptables mmdebstrap uidmap openssh-client python3-venv
# A browser, for the report.
test molecule converge verify destroy: PACKAGES += chromium
# Debian's own, if it will do: one that was built without optimizations takes a quarter more time.
PYTHON ?= $(shell /usr/bin/python3 -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo /usr/bin/python3 || echo python3)
SCENARIOS := $(patsubst molecule/%/molecule.yml,%,$(wildcard molecule/*/molecule.yml))

.PHONY: help demo demo-down test check lint unit role-readmes molecule converge verify destroy bench fuzz packages clean

help:
	@echo "make demo       a throw-away Zulip host; one mail, sent to its port 25, into a channel"
	@echo "make demo-down  removes it"
	@echo "make check      make lint and make unit: what needs no test hosts"
	@echo "make molecule SCENARIO=name   one scenario, from nothing to nothing; one of: $(SCENARIOS)"
	@echo "make converge SCENARIO=name   its hosts, with site.yml run on them; they stay up"
	@echo "make verify SCENARIO=name TEST=file PYTEST_ARGS='-k name'   its tests on these hosts, all or some"
	@echo "make destroy SCENARIO=name    removes them"
	@echo "make test       check and all scenarios"
	@echo "make bench      what a delivery costs, next to what it is compared with"
	@echo "make fuzz FUZZ_TARGET=name FUZZ_SECONDS=60   looks for what breaks a reader of others' input"
	@echo "make role-readmes  writes the roles' variables into their README.md"
	@echo "make clean      removes .venv, .cache and the images"

.cache:
	@mkdir -p .cache

# The environment: what runs the playbooks and the tests.
.cache/venv: requirements.txt | .cache
	@echo "Making the project's own environment in .venv (once; about a minute) ..."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or later is needed; set PYTHON=python3.11"; exit 1; }
	@rm -rf .venv && $(PYTHON) -m venv .venv && .venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt 2>&1 | { grep -v 'is ignored: it is neither' || true; }
	@test -x .venv/bin/molecule && touch $@

# The Debian packages that run the test hosts.
packages: | .cache
	@missing=$$(dpkg-query --show --showformat='$${db:Status-Status} $${Package}\n' $(PACKAGES) 2>/dev/null | sed -n 's/^installed //p' | sort | comm -13 - <(printf '%s\n' $(PACKAGES) | sort)); \
	test "$$(id -u)" = 0 || { echo "The test hosts are podman containers that need root. Run: sudo make $(MAKECMDGOALS) $(MAKEOVERRIDES)"; exit 1; }; \
	test -z "$$missing" || { \
	  echo "Installing" $$missing "(they run the test hosts) ..."; \
	  { apt-get update --quiet && DEBIAN_FRONTEND=noninteractive apt-get install --yes --quiet --no-install-recommends $$missing; } > .cache/packages.log 2>&1 \
	  || { tail -n 20 .cache/packages.log; exit 1; }; }

.PHONY: image images
image: packages
	@$(PYTHON) molecule/shared/testhosts.py image bookworm
images: packages
	@$(PYTHON) molecule/shared/testhosts.py image bookworm trixie

demo: packages
	@$(MAKE) --no-print-directory -j2 .cache/venv image
	@$(PYTHON) molecule/shared/demo.py

demo-down:
	@$(PYTHON) molecule/shared/testhosts.py down zeg-demo
	@echo "The host of make demo is gone. Images, .venv and .cache stay; make clean removes them."

# Of Prometheus nothing but the tool that checks rules. (A Debian package: everything else of it would run here.)
.cache/promtool: | .cache
	@mkdir -p .cache/apt/lists/partial .cache/apt/archives/partial
	@cd .cache && apt="apt-get -qq -o Dir::State::lists=$$PWD/apt/lists -o Dir::Cache=$$PWD/apt -o APT::Sandbox::User=root" && $$apt update \
	&& $$apt download prometheus && dpkg -x prometheus_*.deb promtool.d && mv promtool.d/usr/bin/promtool . \
	&& rm -r prometheus_*.deb promtool.d apt

# Its parts at the same time; each shows what it has to say when it has ended.
check: .cache/venv .cache/promtool
	@$(MAKE) --no-print-directory --output-sync --jobs unit lint-roles lint-style

lint: lint-roles lint-style

.PHONY: lint-roles lint-style
lint-roles: .cache/venv
	@ansible-lint --offline --profile production --strict -q --exclude tests

lint-style: .cache/venv
	@yamllint --strict .
	@ruff check . && ruff format --check .
	@mypy && mypy --python-version 3.14

# Many of them wait. What Python has compiled is kept, whatever the environment says: each process imports all.
unit: .cache/venv .cache/promtool
	@PYTHONDONTWRITEBYTECODE= pytest -q -n 4 tests

# The tables of variables in the roles' README.md, from their specs.
role-readmes: .cache/venv
	@tests/role_readmes.py

.PHONY: scenario
scenario:
	@test -n "$(filter $(SCENARIO),$(SCENARIOS))" || { echo "SCENARIO is '$(SCENARIO)'. Write: make $(MAKECMDGOALS) SCENARIO=name, one of: $(SCENARIOS)"; exit 1; }

molecule converge: scenario packages
	@$(MAKE) --no-print-directory -j2 .cache/venv images
	@molecule $(@:molecule=test) --scenario-name $(SCENARIO)

verify: scenario packages .cache/venv
	@podman ps --format '{{.Names}}' | grep -qx zeg-$(SCENARIO)-outside || { echo "No host of the scenario $(SCENARIO) runs. Run: make destroy converge SCENARIO=$(SCENARIO)"; exit 1; }
	@pytest -q --tb=short molecule/$(SCENARIO)/tests/$(TEST) $(PYTEST_ARGS)

destroy: scenario packages .cache/venv
	@molecule destroy --scenario-name $(SCENARIO)

test: packages
	@$(MAKE) --no-print-directory -j2 .cache/venv images
	@tests/run $(SCENARIOS)

bench: packages
	@$(MAKE) --no-print-directory -j2 .cache/venv image
	@$(PYTHON) bench/bench.py

# What reads what others send. The parts of the corpus that cover something new are kept.
FUZZ_TARGET ?= a_mail
FUZZ_SECONDS ?= 60
fuzz: .cache/venv
	@.venv/bin/python -c 'import atheris' 2>/dev/null || .venv/bin/pip install --quiet --disable-pip-version-check 'atheris ~= 3.0'
	@PYTHONPATH=tests:tests/fuzz:files/email_gateway:plugins/modules .venv/bin/python tests/fuzz/run.py $(FUZZ_TARGET) $(FUZZ_SECONDS)

clean: demo-down
	@podman images --format '{{.Repository}}:{{.Tag}}' | { grep '^localhost/zeg-' || true; } | xargs -r podman rmi
	@rm -rf .venv .cache
