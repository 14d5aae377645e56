#!/usr/bin/env bash
# no_phone_home.sh PROGRAM
#
# Runs the server with its example of every kind of plugin in a network namespace that has nothing
# but a loopback device, loads it, and ends it. The kernel counts every attempt to send or connect
# to where no route leads, name lookups included; there must be none. That the counter counts is
# tried at the end.
set -euo pipefail

program=$(realpath "${1:?give the server\'s program}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ -z "${STOCKADE_INSIDE_NAMESPACE-}" ]; then
  if ! unshare --user --map-root-user --net true 2> /dev/null; then
    echo "NOT CHECKED: network namespaces are not allowed here"
    exit 0
  fi
  STOCKADE_INSIDE_NAMESPACE=1 exec unshare --user --map-root-user --net "$0" "$program"
fi

scratch=$(mktemp -d)
server=
end() {
  [ -z "$server" ] || kill -KILL "$server" 2> /dev/null || true
  rm -rf "$scratch" /dev/shm/stockade-no-phone-home
}
trap end EXIT

# Interfaces are set up by ip where it is installed, and by an ioctl everywhere.
ip link set lo up 2> /dev/null || python3 - << 'PYTHON'
import fcntl, socket, struct
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
    fcntl.ioctl(control, 0x8914, struct.pack("16sh14x", b"lo", 0x1 | 0x40))  # SIOCSIFFLAGS: up, running
PYTHON

attempts() {
  python3 - << 'PYTHON'
import pathlib
count = 0
rows = [line.split() for line in pathlib.Path("/proc/net/snmp").read_text().splitlines() if line.startswith("Ip:")]
count += int(dict(zip(*rows))["OutNoRoutes"])
for line in pathlib.Path("/proc/net/snmp6").read_text().splitlines():
    if line.startswith("Ip6OutNoRoutes"):
        count += int(line.split()[1])
print(count)
PYTHON
}
try_to_call() {
  python3 - << 'PYTHON'
import socket
for family, kind, address in [
    (socket.AF_INET, socket.SOCK_STREAM, ("192.0.2.1", 443)),
    (socket.AF_INET, socket.SOCK_DGRAM, ("192.0.2.1", 53)),
    (socket.AF_INET6, socket.SOCK_STREAM, ("2001:db8::1", 443)),
]:
    with socket.socket(family, kind) as caller:
        try:
            caller.connect(address)
            raise SystemExit(f"{address} could be reached")
        except OSError:
            pass
PYTHON
}

mkdir "$scratch/plugins"
cp examples/mp_runtime_plugins/*.{py,sh} "$scratch/plugins"
cp tests/guests/sleep_loop.wat "$scratch/plugins"
"$program" serve --host 127.0.0.1 --l1-size-gb 0.0625 --shm-name stockade-no-phone-home \
  --runtime-plugin-locations "$scratch/plugins" --plugin-cache-dir "$scratch/cache" 2> "$scratch/log" &
server=$!
for _ in $(seq 600); do
  ! "$program" status --once > /dev/null 2>&1 || break
  kill -0 "$server" || { cat "$scratch/log"; exit 1; }
  sleep 0.05
done
"$program" bench --workload noop,ping,lookup-miss,lookup-hit,store,retrieve --tokens 256 --turns 1 --seconds 0.3

kill -TERM "$server"
wait "$server" || { cat "$scratch/log"; echo "the server ended with $?"; exit 1; }
server=

counted=$(attempts)
if [ "$counted" != 0 ]; then
  cat "$scratch/log"
  echo "FAILED: $counted attempts to reach something outside this machine"
  exit 1
fi
try_to_call
[ "$(attempts)" -ge 2 ] || { echo "FAILED: the kernel does not count attempts here, so none is shown"; exit 1; }
echo "no attempt to reach anything outside this machine"
