#!/usr/bin/env bash
# Everything that must hold: all tests, the source's checks, and the demo of the release binary on the bundled sample.
# Ends with one line `N passed, N failed, N skipped` that sums all of it up. Must never hide a failure of an early step.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/env.sh || exit 1
log=$(mktemp)
trap 'rm -f "$log"' EXIT

cargo test --release --locked --workspace --no-fail-fast 2>&1 | tee "$log"
tests_ok=${PIPESTATUS[0]}

# A build of its own: what is shipped must not contain the bugs that are planted to be found.
cargo test --release --locked -p stentor-chaos --features planted --test planted \
  2>&1 | tee -a "$log"
planted_ok=${PIPESTATUS[0]}

scripts/verify.sh 2>&1 | tee -a "$log"

echo "demo on the bundled sample:"
report=$("$CARGO_TARGET_DIR/release/stentor" dev --demo --exit --json | tail -1)
if [[ $report == *'"ok":true'* ]]; then
  echo "check demo ... ok" | tee -a "$log"
else
  echo "check demo ... FAILED" | tee -a "$log"
fi
echo "$report"

read -r passed failed skipped < <(awk '
  /^test result:/ {
    for (i = 2; i <= NF; i++) {
      if ($i == "passed;") p += $(i - 1)
      if ($i == "failed;") f += $(i - 1)
      if ($i == "ignored;") s += $(i - 1)
    }
  }
  /^check .* ok$/ { p++ }
  /^check .* FAILED$/ { f++ }
  END { print p + 0, f + 0, s + 0 }' "$log")
# A test program that did not compile, or died, counts no test as failed.
[ "$tests_ok" -ne 0 ] || [ "$planted_ok" -ne 0 ] && [ "$failed" -eq 0 ] && failed=1
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
