#!/usr/bin/env bash
# Builds the RocksDB that the `rocksdb` crate vendors, once, into a cache outside the clone, and prints the folder of
# librocksdb.a. Cargo would otherwise compile it (about 1,350 CPU-seconds) once per profile and per RUSTFLAGS.
# The cache is keyed by the crate's version, the compiler and the flags. Must never print anything but the folder on stdout.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
version=$(sed -n '/^name = "librocksdb-sys"$/{n;s/^version = "\(.*\)"$/\1/p}' "$here/Cargo.lock")
crate=$(sed -n '/^name = "rocksdb"$/{n;s/^version = "\(.*\)"$/\1/p}' "$here/Cargo.lock")
[ -n "$version" ] && [ -n "$crate" ] || { echo "rocksdb.sh: no rocksdb in Cargo.lock" >&2; exit 1; }

case "$(uname -m)" in
  x86_64) flags="-C target-feature=+sse4.2,+pclmulqdq" ;; # hardware CRC32C; every x86-64 server since 2011 has both
  *) flags="" ;;
esac
compiler=$(${CXX:-c++} --version | head -1)
key=$(printf '%s|%s|%s|%s' "$version" "$flags" "$compiler" "${CXXFLAGS:-}" | sha256sum | cut -c1-12)
cache="${XDG_CACHE_HOME:-$HOME/.cache}/stentor/rocksdb-$version-$key"

if [ ! -f "$cache/librocksdb.a" ]; then
  echo "Building RocksDB ($version) once into $cache; this takes about ten minutes on two cores" >&2
  work="$cache.build"
  mkdir -p "$work/src"
  printf '[package]\nname = "rocksdb-once"\nversion = "0.0.0"\nedition = "2021"\n[workspace]\n[dependencies]\nrocksdb = { version = "=%s", default-features = false, features = ["bindgen-runtime", "lz4"] }\n[profile.release]\nopt-level = 3\ndebug = false\n' "$crate" > "$work/Cargo.toml"
  echo 'fn main() {}' > "$work/src/main.rs"
  (cd "$work" && env -u ROCKSDB_LIB_DIR -u ROCKSDB_STATIC CARGO_TARGET_DIR="$work/target" RUSTFLAGS="$flags" cargo build --release --quiet >&2)
  built=$(find "$work/target/release/build" -path '*librocksdb-sys*/out/librocksdb.a' | head -1)
  [ -n "$built" ] || { echo "rocksdb.sh: the build made no librocksdb.a" >&2; exit 1; }
  mkdir -p "$cache"
  strip --strip-debug -o "$cache/librocksdb.a.new" "$built"
  mv "$cache/librocksdb.a.new" "$cache/librocksdb.a"
  rm -rf "$work"
fi
printf '%s\n' "$cache"
