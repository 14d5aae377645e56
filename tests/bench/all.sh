#!/usr/bin/env bash
# all.sh LMCACHE [--short] [PART...]
#
# Fills the tables of docs/benchmarks.md in one run: Stockade beside LMCache 0.5.6 and beside a bare
# echo, turn by turn; starts; idle memory; sleeping and spinning plugins; how cost grows. LMCACHE is
# the program of a virtual environment with lmcache==0.5.6, or - to leave it out. Raw output goes to
# docs/benchmarks/ (with --short to target/bench, in turns too short to mean anything). The spinning
# plugins need pyzmq and msgspec, which the Python beside LMCACHE has; PYTHON names another one. Needs
# a release build, an otherwise idle machine, and about an hour; parts of it are peer, echo, start, growth,
# spinning, neighbours, rankers, sleeping, calls, transport and engine, of which some may be named.
set -euo pipefail

lmcache=${1:?give the path of lmcache, or -}
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
target=${CARGO_TARGET_DIR:-target}
program=$target/release/stockade out=docs/benchmarks turns=3 long=1 starts=15 short=
if [ "${2-}" = --short ]; then
  program=$target/debug/stockade out=$target/bench turns=1 long=0.05 starts=2 short=--short
  shift
fi
shift
parts=(peer echo start growth spinning neighbours rankers)
# These build examples, in which a short measurement saves nothing.
[ -n "$short" ] || parts+=(sleeping calls transport engine)
[ $# = 0 ] || parts=("$@")
[ -x "$program" ] || { echo "there is no $program: cargo build --release" >&2; exit 1; }
mkdir -p "$out"

scratch=$(mktemp -d)
ours='' theirs=''
end() {
  for process in $ours $theirs; do kill -TERM "$process" 2> /dev/null || true; done
  for process in $ours $theirs; do wait "$process" 2> /dev/null || true; done
  rm -rf "$scratch" "/dev/shm/stockade-bench-peer-$$"
}
trap end EXIT

ports=($(python3 -c '
import socket
sockets = [socket.socket() for _ in range(4)]
for it in sockets: it.bind(("127.0.0.1", 0))
print(*(it.getsockname()[1] for it in sockets))'))
url=tcp://127.0.0.1:${ports[0]}
raw=$out/bench.txt

is_wanted() { [[ " ${parts[*]} " == *" $1 "* ]]; }
say() { printf '\n## %s\n' "$*" | tee -a "$raw"; }
measure() {                             # BENCH FLAGS...: the command, then its table
  printf '\n$ stockade bench %s\n' "$*" | tee -a "$raw"
  if ! "$program" bench --url "$url" --turns "$turns" --seconds "$long" "$@" 2> "$scratch/progress" | tee -a "$raw"; then
    tail -n 3 "$scratch/progress"
    exit 1
  fi
}
await() {                               # URL: until a server answers there
  for _ in $(seq 1200); do
    ! "$program" bench --url "$1" --workload noop --turns 1 --seconds 0.01 > /dev/null 2>&1 || return 0
    sleep 0.1
  done
  echo "no answer from $1" >&2
  cat "$scratch"/*.log >&2
  exit 1
}

{
  echo "Stockade $("$program" --version), $(git rev-parse --short HEAD), $(date -u +%FT%TZ)"
  echo "$(nproc) x $(sed -n 's/^model name.*: //p' /proc/cpuinfo | head -n 1), Linux $(uname -r), load $(cut -d ' ' -f 1-3 /proc/loadavg)"
} | tee "$raw"

start_ours() {
  [ -z "$ours" ] || return 0
  "$program" serve --host 127.0.0.1 --port "${ports[0]}" --http-port "${ports[1]}" --l1-size-gb 2 \
    --plugin-cache-dir "$scratch/cache" 2> "$scratch/stockade.log" &
  ours=$!
  await "$url"
}

peer() {
  if [ "$lmcache" = - ]; then return; fi
  start_ours
  "$lmcache" server --host 127.0.0.1 --port "${ports[2]}" --http-port "${ports[3]}" --l1-size-gb 2 \
    --eviction-policy LRU --supported-transfer-mode engine_driven --shm-name "stockade-bench-peer-$$" \
    > "$scratch/lmcache.log" 2>&1 &
  theirs=$!
  local other=tcp://127.0.0.1:${ports[2]}
  await "$other"
  say "beside LMCache"
  measure --compare "$other" --workload noop --clients 1,16
  measure --compare "$other" --workload ping
  measure --compare "$other" --workload lookup-miss,lookup-hit --tokens 1024,8192,32768,131072 --chunk-kib 16 --plot "$scratch"
  cp "$scratch/latency-over-tokens.svg" "$out/"
  measure --compare "$other" --workload store,retrieve,chat --tokens 256,32768
}

echo_alone() {
  start_ours
  say "beside a bare echo"
  measure --compare-echo --workload noop,chunk-size --clients 1,4,16 --plot "$scratch"
  cp "$scratch/throughput-over-clients.svg" "$out/"
  measure --compare-echo --workload noop --clients 16 --in-flight 16
  measure --compare-echo --workload lookup-miss,lookup-hit --tokens 1024,8192,32768,131072 --chunk-kib 16
  # What two requests cost on this machine right after a copy of this size, whoever answers them.
  measure --compare-echo --workload store,retrieve --tokens 256 --chunk-kib 256
  measure --compare-echo --workload store,retrieve --tokens 256 --chunk-kib 32768
}

start() {
  say "start, idle memory"
  python3 tests/bench/start.py --server "$program" --starts "$starts" | tee -a "$raw"
}

growth() {
  say "growth"
  python3 tests/bench/growth.py --server "$program" --output "$out" $short | tee -a "$raw"
}

# The turns of these are given as so many times those of the benchmark.
windows() {                             # SCRIPT TIMES
  local python=${PYTHON:-$(dirname "$lmcache")/python}
  if "$python" -c 'import msgspec, zmq' 2> /dev/null; then
    "$python" "tests/bench/$1.py" --server "$program" --rounds "$((turns * $2))" --seconds "$long" | tee -a "$raw"
  else
    echo "NOT MEASURED: $python has no msgspec and zmq" | tee -a "$raw"
  fi
}
spinning() { say "spinning plugins" && windows spinning_plugins 2; }
neighbours() { say "noisy neighbours" && windows noisy_neighbour 3; }
rankers() { say "bad rankers" && windows bad_ranker 2; }

sleeping() {
  say "sleeping plugins"
  # A guest in Go, where its toolchain is (plugin-sdk/toolchain.sh go).
  local guest=target/plugins/mp_heartbeat_go.wasm
  plugin-sdk/build.sh examples/mp-heartbeat-go || true
  if [ ! -f "$guest" ]; then guest=''; echo "NOT MEASURED: a guest in Go" | tee -a "$raw"; fi
  cargo run --quiet --release -p stockade-sandbox --example density -- ${guest:+"$guest=500"} 2>&1 | tee -a "$raw"
}

calls() {
  say "calls of plugins"
  cargo run --quiet --release --workspace --example host_calls 2>&1 | tee -a "$raw"
}

transport() {
  say "the transport alone"
  cargo run --quiet --release -p stockade-transport --example echo -- compare 2>&1 | tee -a "$raw"
}

engine() {
  say "the cache engine"
  cargo bench -p stockade-cache 2>&1 | tee -a "$raw"
}

if is_wanted peer; then peer; fi
if is_wanted echo; then echo_alone; fi
end
ours='' theirs='' scratch=$(mktemp -d)
for part in start growth spinning neighbours rankers sleeping calls transport engine; do
  if is_wanted "$part"; then "$part"; fi
done
