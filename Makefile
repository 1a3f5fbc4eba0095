# Two commands: `make run` and `make test`. Each installs what is missing the first time and starts
# at once the second time. `make help` lists the rest.

# What `make run` mounts: a directory, or for instance UFS=s3://bucket/prefix with the usual AWS_*
# variables, and S3_ENDPOINT=http://host:port for another S3 server than AWS's.
UFS ?= data
MOUNT ?= mnt
# Each under storage keeps a state of its own.
STATE ?= var/$(shell printf '%s' '$(UFS)' | tr -cs 'A-Za-z0-9.\n' '-' | sed 's/^-//')
S3_ENDPOINT ?=
RUN_ARGS ?=
TEST_ARGS ?=
BENCH_ARGS ?= /tmp
FAULTS_KILLS ?= 200
FAULTS_FILES ?= 1000000
FAULTS_OPERATIONS ?= 100000
FAULTS_POWER_CUTS ?= 100
FAULTS_CUTS ?= 200
FAULTS_CUTOFFS ?= 50
FAULTS_S3_ROUNDS ?= 500
FAULTS_PERSIST_KILLS ?= all
FAULTS_KEEPER_KILLS ?= 30

VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.cfg pyproject.toml constraints.txt scripts/install

.PHONY: run test test-faults check bench mount-helper clean help

# Moved or copied with its environment, which has the old path in it: install again.
ifneq ($(filter-out $(CURDIR),$(shell cat $(VENV)/.place 2>/dev/null)),)
.PHONY: $(VENV)/.installed-run $(VENV)/.installed-test
endif

run: $(VENV)/.installed-run
	@mkdir -p -m 700 var && mkdir -p '$(MOUNT)' $(if $(findstring ://,$(UFS)),,'$(UFS)')
	@exec $(BIN)/alluxiofuse local --ufs '$(UFS)' --mount '$(MOUNT)' --state '$(STATE)' --hints \
		$(if $(S3_ENDPOINT),--option 'endpoint=$(S3_ENDPOINT)') $(RUN_ARGS)

# All of them: two files at a time, since many tests wait for something to be noticed.
test: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(if $(TEST_ARGS),$(TEST_ARGS),-n 2 --dist loadfile)

# Kills, cut-offs and failing parts, for hours instead of a minute; FAULTS_KILLS=20 and so on for less.
test-faults: $(VENV)/.installed-test
	FAULTS_KILLS=$(FAULTS_KILLS) FAULTS_WHERE=both FAULTS_WRITE_TYPES=both FAULTS_OPERATIONS=$(FAULTS_OPERATIONS) \
	FAULTS_POWER_CUTS=$(FAULTS_POWER_CUTS) FAULTS_FILES=$(FAULTS_FILES) FAULTS_CUTS=$(FAULTS_CUTS) \
	FAULTS_CUTOFFS=$(FAULTS_CUTOFFS) \
	FAULTS_KEEPER_KILLS=$(FAULTS_KEEPER_KILLS) FAULTS_WORKERS=all FAULTS_CLIENTS=200 \
	FAULTS_S3_ROUNDS=$(FAULTS_S3_ROUNDS) FAULTS_PERSIST_KILLS=$(FAULTS_PERSIST_KILLS) \
		$(BIN)/python -m pytest -s -o faulthandler_timeout=0 tests/faults tests/coherence \
		tests/e2e/test_keeper.py tests/e2e/test_keeper_passthrough.py $(TEST_ARGS)

check: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layout.py

bench: $(VENV)/.installed-run
	$(BIN)/python scripts/bench.py $(BENCH_ARGS)

# For mount(8) and /etc/fstab: it looks for helpers in /sbin only, and sets no PATH.
mount-helper: $(VENV)/.installed-run
	ln -sf '$(CURDIR)/$(BIN)/mount.fuse.alluxiofuse' /sbin/mount.fuse.alluxiofuse
	ln -sf '$(CURDIR)/$(BIN)/alluxiofuse' /usr/local/bin/alluxiofuse

$(VENV)/.installed-run: $(SOURCES)
	scripts/install run

$(VENV)/.installed-test: $(SOURCES)
	scripts/install test

clean:
	@if grep -qs " $(CURDIR)/$(MOUNT) fuse" /proc/mounts; then echo "$(MOUNT) is still mounted: stop 'make run' first" >&2; exit 1; fi
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help:
	@echo 'make run [UFS=dir|s3://bucket/prefix] [S3_ENDPOINT=url] [MOUNT=dir] [STATE=dir]   mount it, until Ctrl-C'
	@echo 'make test [TEST_ARGS=...]    all tests, with real FUSE mounts and a real S3 server'
	@echo 'make test-faults             kills, cut-offs and failing parts, hundreds of each'
	@echo 'make check                   ruff, mypy --strict, the layering test'
	@echo 'make bench BENCH_ARGS="dir dir..."   measure directories side by side'
	@echo 'make mount-helper            let mount(8) and /etc/fstab find it (as root)'
	@echo 'make clean                   remove what was built (not data, mnt, var)'
