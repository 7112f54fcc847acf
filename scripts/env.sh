# Sourced by the Makefile and by developers: where build artefacts go (outside the clone) and which RocksDB is linked.
# Must never build anything but RocksDB.
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/stentor/target}"
ROCKSDB_LIB_DIR="${ROCKSDB_LIB_DIR:-$("$(git rev-parse --show-toplevel)/scripts/rocksdb.sh")}" || return 1
export ROCKSDB_LIB_DIR ROCKSDB_STATIC=1
