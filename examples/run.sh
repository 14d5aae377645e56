#!/usr/bin/env bash
# run.sh [FLAG...]
#
# Builds Stockade and the example plugins, then starts the server with them: two scripts and two
# sandboxed modules. FLAGs go to `stockade serve` (for instance --port 6555). Where there is no
# toolchain for sandboxed plugins, and none can be had, hello.wat stands in for the two modules.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
BUILD=${CARGO_TARGET_DIR:-target}

say() { printf 'run: %s\n' "$*"; }

missing=0
need() {                                # COMMAND HOW_TO_GET_IT
  if ! command -v "$1" > /dev/null 2>&1; then
    printf 'run: there is no %s: %s\n' "$1" "$2" >&2
    missing=1
  fi
}
need cargo "install Rust with rustup"
need cc "install a C compiler (Debian, Ubuntu: apt-get install build-essential; macOS: xcode-select --install)"
need python3 "install Python 3 (Debian, Ubuntu: apt-get install python3)"
if [ $missing = 1 ]; then exit 69; fi

step() {                                # NAME COMMAND...
  local name=$1 start=$SECONDS status=0
  shift
  say "$name ..."
  "$@" || status=$?
  say "$name: $([ $status = 0 ] || printf 'failed, ')$((SECONDS - start)) s"
  return $status
}

step "toolchain for sandboxed plugins" plugin-sdk/toolchain.sh rust go || true
sandboxed=()
for directory in examples/*/; do
  if [[ -f $directory/Cargo.toml || -f $directory/go.mod ]]; then sandboxed+=("${directory%/}"); fi
done
step "example plugins" plugin-sdk/build.sh "${sandboxed[@]}" || true
step "server" cargo build --release --locked

plugins=(examples/mp_runtime_plugins)
for directory in "${sandboxed[@]}"; do
  name=${directory##*/}
  module=target/plugins/${name//-/_}.wasm
  if [[ -f $module ]]; then plugins+=("$module"); fi
done
if [[ ${#plugins[@]} == 1 ]]; then
  say "no sandboxed plugin could be built, so examples/hello.wat runs in their place"
  plugins+=(examples/hello.wat)
fi
say "stockade serve, ready for engines when it says so; Ctrl-C stops it"
exec "$BUILD/release/stockade" serve --l1-size-gb 1 --eviction-policy LRU --runtime-plugin-locations "${plugins[@]}" "$@"
