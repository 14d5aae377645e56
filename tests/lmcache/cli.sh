#!/usr/bin/env bash
# LMCache's own command line and frontend against this server, unmodified. Prints a transcript.
#
#   tests/lmcache/cli.sh VENV [STOCKADE]
#
# VENV is a virtual environment with lmcache==0.5.6; STOCKADE a built binary.
set -uo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
venv=${1:?give a virtual environment with lmcache==0.5.6}
stockade=${2:-target/debug/stockade}
if [[ ! -x $venv/bin/lmcache ]]; then
  echo "LMCACHE'S COMMAND LINE IS NOT TRIED: there is no $venv/bin/lmcache" >&2
  exit 0
fi
work=$(mktemp -d)
server=0 frontend=0 failed=0
finish() {
  ((frontend == 0)) || kill "$frontend" 2> /dev/null
  ((server == 0)) || kill "$server" 2> /dev/null
  wait 2> /dev/null
  rm -rf "$work"
}
trap finish EXIT

"$stockade" serve --host 127.0.0.1 --port 0 --http-port 0 --l1-size-gb 0.25 \
  --plugin-cache-dir "$work/cache" 2> "$work/log" &
server=$!
until grep -q 'serving on' "$work/log"; do
  kill -0 "$server" || { cat "$work/log"; exit 1; }
  sleep 0.05
done
url=$(grep -o 'HTTP on http://[0-9.:]*' "$work/log" | cut -d' ' -f3)

export LMCACHE_TRACK_USAGE=false LMCACHE_DISABLE_BANNER=1
try() {                                 # PATTERN COMMAND...
  local pattern=$1 output
  shift
  printf '\n$ %s\n' "${*/"$venv/bin/"/}"
  output=$("$@" 2>&1)
  printf '%s\n' "$output"
  if ! grep -qE "$pattern" <<< "$output"; then
    printf 'MISSING: %s\n' "$pattern"
    failed=1
  fi
}
lmcache=$venv/bin/lmcache
try 'Status: +OK' "$lmcache" ping kvcache --url "$url"
try 'Eviction policy: +LRU' "$lmcache" describe kvcache --url "$url"
try 'ok|OK|cleared' "$lmcache" kvcache clear --url "$url"
try '1\.5' "$lmcache" quota set tenant-a --limit-gb 1.5 --url "$url"
try 'Exists: +(True|true)' "$lmcache" quota get tenant-a --url "$url"
try 'tenant-a' "$lmcache" quota list --url "$url"
try 'removed' "$lmcache" quota delete tenant-a --url "$url"
try 'not_found' "$lmcache" quota delete tenant-a --url "$url"
try 'limit_gb' "$lmcache" quota set tenant-a --limit-gb -1 --url "$url"

# The frontend is a page and a proxy; its page asks for these of each node.
port=${url##*:}
printf '[{"name": "stockade", "host": "127.0.0.1", "port": "%s"}]' "$port" > "$work/nodes.json"
front=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
"$venv/bin/python" -m lmcache.lmcache_frontend.app --host 127.0.0.1 --port "$front" \
  --config "$work/nodes.json" > "$work/frontend.log" 2>&1 &
frontend=$!
for _ in $(seq 300); do
  curl -fs "http://127.0.0.1:$front/api/nodes" > /dev/null && break
  kill -0 "$frontend" || { cat "$work/frontend.log"; exit 1; }
  sleep 0.1
done
proxy="http://127.0.0.1:$front/proxy2/stockade"
try '"stockade"' curl -s "http://127.0.0.1:$front/api/nodes"
try '0\.' curl -s "$proxy/version"
try 'stockade: INFO' curl -s "$proxy/loglevel"
try 'WARN' curl -s "$proxy/loglevel?logger_name=stockade&level=WARNING"
try 'maintenance: running' curl -s "$proxy/threads"
try 'lmcache_mp_l1_usage_ratio' bash -c "curl -s '$proxy/metrics' | grep -m3 lmcache_mp_l1"
try 'no-such-route' curl -s "$proxy/env"
((failed == 0)) && printf '\nall answers are as expected\n'
exit "$failed"
