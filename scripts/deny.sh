#!/usr/bin/env bash
# Checks licences, banned crates and sources of everything that is linked (deny.toml), with a cargo-deny that is built
# once into a cache outside the clone. Must never consult the network beyond the crate registry.
set -euo pipefail

version=0.20.2
root="${XDG_CACHE_HOME:-$HOME/.cache}/stentor/tools"
if [ "$("$root/bin/cargo-deny" --version 2>/dev/null)" != "cargo-deny $version" ]; then
  echo "deny.sh: building cargo-deny $version once into $root" >&2
  env -u CARGO_TARGET_DIR RUSTFLAGS= cargo install cargo-deny --version "$version" --locked --quiet \
    --no-default-features --root "$root" >&2
fi
# Building downloads what this machine links; the graph has other systems' crates too.
cargo fetch --locked --quiet >&2 || echo "deny.sh: not every crate could be fetched" >&2
exec "$root/bin/cargo-deny" --offline --locked check --hide-inclusion-graph licenses bans sources
