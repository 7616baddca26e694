# Installs what is missing (Debian 12, root), then calls cargo. Everything that is built or fetched lies in a cache outside the
# clone, so that a second clone costs little and `git clean` loses nothing.

SHELL := /bin/bash
KEELSON_CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/keelson
CARGO_TARGET_DIR ?= $(KEELSON_CACHE)/target
export KEELSON_CACHE CARGO_TARGET_DIR

# One profile for everything: RocksDB takes minutes to compile, so it is compiled once.
PROFILE := --release
# And one selection of crates: another one may turn a feature of a dependency, and cargo would build much again.
BINS := cargo build $(PROFILE) --workspace --bins
BIN := $(CARGO_TARGET_DIR)/release

# RocksDB is compiled once into the cache (.ci/rocksdb says why) and linked from there.
ROCKSDB_VERSION := $(shell awk -F'"' '/^name = "librocksdb-sys"/ { getline; print $$2 }' Cargo.lock)
ROCKSDB_LIB_DIR ?= $(KEELSON_CACHE)/rocksdb-$(ROCKSDB_VERSION)
export ROCKSDB_LIB_DIR
export ROCKSDB_STATIC := 1

# A workspace of its own: what it needs to be built is not asked of who builds ours.
CLIENT := tests/e2e/clients/rust/Cargo.toml

# Arguments for the member that `make run` starts, beside its name and address.
ARGS ?=

.PHONY: help demo test run peers bench lint fmt build rocksdb

help:
	@echo 'make demo    three store members, two pods, a node: everything from end to end, told as a story'
	@echo 'make test    every test; real etcd and kube-apiserver beside ours if `make peers` was run'
	@echo 'make run     one store member on 127.0.0.1:2379, data in ./data'
	@echo "make peers   build etcd 3.7, its benchmark, and the programs of Kubernetes into the cache, and install clients of others"
	@echo 'make bench   ours beside etcd, one table (ARGS=data: a store of 1,000,000 keys; ARGS=watch: crowds of watchers; ARGS=leases: 100,000 leases)'
	@echo 'make lint    format, clippy, licences'

rocksdb:
	@.ci/need build
	@.ci/rocksdb >/dev/null

build: rocksdb
	$(BINS)

demo: rocksdb
	@.ci/need demo
	$(BINS)
	@demo/run $(BIN)

test: rocksdb
	@.ci/need test
	@.ci/test

run: rocksdb
	$(BINS)
	exec $(BIN)/keelson --name default --data-dir ./data $(ARGS)

peers:
	@.ci/need peers clients
	@tests/peers/build
	@tests/e2e/clients/build

bench: rocksdb
	@.ci/need peers bench
	@tests/peers/build etcd benchmark
	$(BINS)
	@$(BIN)/bench $(ARGS)

lint: rocksdb
	cargo fmt --all --check
	cargo fmt --check --manifest-path $(CLIENT)
	cargo clippy $(PROFILE) --workspace --all-targets -- $(if $(CI),-D warnings)
	@.ci/deny
	@.ci/deny $(CLIENT)

fmt:
	cargo fmt --all
	cargo fmt --manifest-path $(CLIENT)
