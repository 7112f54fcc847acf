# Sourced by the Makefile and by developers: where build artefacts go (outside the clone) and which RocksDB is linked.
# Must never build anything but RocksDB.
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/stentor/target}"
ROCKSDB_LIB_DIR="${ROCKSDB_LIB_DIR:-$("$(git rev-parse --show-toplevel)/scripts/rocksdb.sh")}" || return 1
export ROCKSDB_LIB_DIR ROCKSDB_STATIC=1

# Cargo names artefacts by their place in the workspace and judges by file times alone: after another checkout has built
# here, its artefacts would pass for this one's unless ours look newer.
stentor_checkout=$(git rev-parse --show-toplevel)
if [ "$(cat "$CARGO_TARGET_DIR/.checkout" 2>/dev/null)" != "$stentor_checkout" ]; then
  mkdir -p "$CARGO_TARGET_DIR"
  git -C "$stentor_checkout" ls-files -z '*.rs' '*.proto' '*.toml' | (cd "$stentor_checkout" && xargs -0 touch -c --)
  printf '%s\n' "$stentor_checkout" > "$CARGO_TARGET_DIR/.checkout"
fi
unset stentor_checkout
