#!/usr/bin/env bash
# run.sh [FLAG...]
#
# Starts Stockade, lets one process store the KV cache of a prompt and another one continue from it,
# and checks that the logits are the same. FLAGs go to `stockade serve` (--shm-name "" moves the KV
# inline instead of through shared memory). PYTHON names an interpreter with requirements.txt
# installed, STOCKADE a built server; without them both are made under target/.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$here/../.."
build=${CARGO_TARGET_DIR:-target}

if [ -z "${STOCKADE:-}" ]; then
  cargo build --release --locked
  STOCKADE=$build/release/stockade
fi
if [ -z "${PYTHON:-}" ]; then
  PYTHON=$build/transformers-cpu/bin/python
  if ! "$PYTHON" -c 'import lmcache, transformers' 2> /dev/null; then
    python3 -m venv "$build/transformers-cpu"
    "$PYTHON" -m pip install --quiet --requirement "$here/requirements.txt"
  fi
fi

log=$(mktemp)
"$STOCKADE" serve --host 127.0.0.1 --port 0 --http-port 0 --l1-size-gb 0.25 "$@" 2> "$log" &
server=$!
trap 'kill $server 2> /dev/null; wait $server 2> /dev/null; rm -f "$log"' EXIT
for _ in $(seq 200); do
  if url=$(grep -om1 'serving on tcp://[0-9.:]*' "$log"); then break; fi
  kill -0 $server 2> /dev/null || { cat "$log" >&2; exit 1; }
  sleep 0.05
done
url=${url#serving on }
"$PYTHON" "$here/engine.py" store "$url"
"$PYTHON" "$here/engine.py" load "$url"
