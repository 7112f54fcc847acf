# What people and CI call. Everything real is in scripts/, so that each step can be run alone too.
SHELL := bash

.PHONY: help setup build run test verify fix bench peers chaos
help:
	@echo "make run [ARGS=…]  build, start a cluster in one process, replay real conversations, prove the result"
	@echo "                   (ARGS=--exit ends after that; ARGS is passed on to 'stentor dev --demo')"
	@echo "make build         build the binary as it is shipped and print where it is"
	@echo "make test          all tests and checks"
	@echo "make chaos         kill real processes under load and judge what clients were promised"
	@echo "                   (ARGS='brokers --json': one run, for programs; ARGS=--help: all options)"
	@echo "make peers         install the servers that 'stentor bench peers' sets beside ours, build the floors"
	@echo "make bench [ARGS=…]  measure a cluster under load (ARGS='fanout --local --devices 1000'; ARGS=--help: all)"
	@echo "make verify        read-only checks: format, lints, licences"
	@echo "make fix           format and apply what clippy can mend by itself"

setup:
	@scripts/setup.sh

# What is shipped and measured has a profile of its own (Cargo.toml).
build: setup
	@. scripts/env.sh && cargo build --profile dist --locked -p stentor-cli && echo "$$CARGO_TARGET_DIR/dist/stentor"

run: setup
	@. scripts/env.sh && cargo build --release --locked -p stentor-cli && \
	  exec "$$CARGO_TARGET_DIR/release/stentor" dev --demo $(ARGS)

test: setup
	@scripts/test.sh

verify: setup
	@scripts/verify.sh

fix: setup
	@. scripts/env.sh && cargo fmt --all && cargo clippy --release --fix --allow-dirty --allow-staged --workspace --all-targets

# One after the other: the binary under test is compiled as it is shipped, without what only chaos asks of libraries.
chaos: setup
	@. scripts/env.sh && cargo build --profile dist --locked -p stentor-cli && \
	  cargo build --release --locked -p stentor-chaos && \
	  STENTOR_BIN="$${STENTOR_BIN:-$$CARGO_TARGET_DIR/dist/stentor}" exec "$$CARGO_TARGET_DIR/release/stentor-chaos" $(ARGS)

# The floors are examples of the crates that own what they use; they lie beside the binary.
peers: setup
	@. scripts/env.sh && cargo build --profile dist --locked -p stentor-cli && \
	  cargo build --profile dist --locked -p stentor-transport --example bare_quic && \
	  cargo build --profile dist --locked -p stentor-raft-store --example raw_floor && scripts/peers.sh

bench: setup
	@. scripts/env.sh && cargo build --profile dist --locked -p stentor-cli && \
	  exec "$$CARGO_TARGET_DIR/dist/stentor" bench $(if $(ARGS),$(ARGS),send --local)
