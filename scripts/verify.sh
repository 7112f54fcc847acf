#!/usr/bin/env bash
# Read-only checks of the source: format, lints, dependencies. Prints one `ok` or `FAILED` line for each and ends with
# the count of those that failed as its exit code.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/env.sh || exit 1

failed=0
step() {
  local name=$1
  shift
  if "$@"; then echo "check $name ... ok"; else
    echo "check $name ... FAILED"
    failed=$((failed + 1))
  fi
}

step format cargo fmt --all --check
step lints cargo clippy --release --locked --workspace --all-targets --quiet -- -D warnings
step dependencies scripts/deny.sh
exit "$failed"
