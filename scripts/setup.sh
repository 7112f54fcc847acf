#!/usr/bin/env bash
# Makes sure that everything a build needs is there: cargo, a C++ compiler, libclang (for the bindings of RocksDB).
# Installs what is missing on Debian and its kin when run as root; otherwise names the packages and fails.
# Must never touch anything when nothing is missing.
set -euo pipefail

# libclang-cpp, which other packages bring, is another library.
have_libclang() {
  [ -n "${LIBCLANG_PATH:-}" ] && return 0
  ldconfig -p 2>/dev/null | grep -qE 'libclang(-[0-9.]+)?\.so' && return 0
  local name
  for name in 'libclang.so*' 'libclang-[0-9]*.so*'; do
    compgen -G "/usr/lib/llvm-*/lib/$name" >/dev/null || compgen -G "/usr/lib*/$name" >/dev/null && return 0
  done
  return 1
}

if ! command -v cargo >/dev/null; then
  echo "setup: cargo is missing; install Rust 1.90 or newer with rustup (https://rustup.rs)" >&2
  exit 1
fi

packages=()
command -v c++ >/dev/null || packages+=(g++)
command -v cc >/dev/null || packages+=(gcc)
command -v git >/dev/null || packages+=(git)
# libclang alone lacks the compiler's own headers, which `clang` brings.
have_libclang || packages+=(libclang-dev clang)
[ ${#packages[@]} -eq 0 ] && exit 0

if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
  echo "setup: installing ${packages[*]}" >&2
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq >&2
  apt-get install -y -qq --no-install-recommends "${packages[@]}" >&2
else
  echo "setup: missing: ${packages[*]}" >&2
  echo "setup: on Debian or Ubuntu: sudo apt-get install ${packages[*]}" >&2
  echo "setup: elsewhere install their like, or set LIBCLANG_PATH" >&2
  exit 1
fi
