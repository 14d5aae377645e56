#!/usr/bin/env bash
# build.sh [DIRECTORY...]        (no argument: every plugin below examples/ and plugins/)
#
# Builds plugins for the sandbox with the compilers that toolchain.sh set up: a directory with a
# Cargo.toml or a go.mod becomes target/plugins/<directory, with - as _>.wasm, and a manifest of that
# name in it goes along. A plugin that has not changed since is left alone. A plugin whose compiler is missing or that does not build is named, the others
# are built, and the exit status is 1. The server's own build folder is not touched.
#
# Environment: STOCKADE_TOOLCHAIN_DIR, as for toolchain.sh.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
BIN=$("$ROOT/plugin-sdk/toolchain.sh" --bin)
OUT=$ROOT/target/plugins
GUESTS=$ROOT/target/guests              # a folder of their own: guests may be built by another rustc

say() { printf 'build: %s\n' "$*"; }

artefact_of() { local name=${1##*/}; printf '%s/%s.wasm' "$OUT" "${name//-/_}"; }

up_to_date() {                          # ARTEFACT DIRECTORY COMPILER: nothing it is made of is newer
  [ -f "$1" ] && [ -z "$(find "$2" "$3" "$ROOT/plugin-sdk" -name target -prune -o -newer "$1" \
    ! -path "$ROOT/plugin-sdk" ! -name '*.sh' ! -name '*.md' -print -quit)" ]
}

build_rust() {                          # DIRECTORY ARTEFACT
  local name=${1##*/} release=$GUESTS/wasm32-wasip1/release built
  (cd "$1" && CARGO_TARGET_DIR=$GUESTS "$BIN/wasm-cargo" build --release --quiet --locked) || return 1
  for built in "$release/$name.wasm" "$release/${name//-/_}.wasm"; do    # a program, a library
    if [ -f "$built" ]; then cp "$built" "$2.new"; return; fi
  done
  say "$name: its package must be called $name"
  return 1
}

build_go() {                            # DIRECTORY ARTEFACT
  local mode=default
  # What registers itself with the SDK is a reactor.
  if grep -qs '"stockade.dev/plugin/reactor"' "$1"/*.go; then mode=c-shared; fi
  (cd "$1" && "$BIN/wasm-go" build -buildmode=$mode -trimpath -ldflags='-s -w' -o "$2.new" .)
}

manifest() {                            # DIRECTORY ARTEFACT: the manifest beside the artefact is the directory's
  local beside=${2%.wasm}.plugin.toml source
  source=$1/${beside##*/}
  if [ ! -f "$source" ]; then rm -f "$beside"; return; fi
  if ! cmp -s "$source" "$beside"; then cp "$source" "$beside.new" && mv -f "$beside.new" "$beside"; fi
}

build() {                               # DIRECTORY
  local directory=$1 language compiler artefact start=$SECONDS
  artefact=$(artefact_of "$directory")
  if [ -f "$directory/Cargo.toml" ]; then language=rust compiler=$BIN/wasm-cargo; else language=go compiler=$BIN/wasm-go; fi
  if [ ! -x "$compiler" ]; then
    say "${directory#"$ROOT"/}: skipped, it needs 'plugin-sdk/toolchain.sh $language'"
    return 1
  fi
  manifest "$directory" "$artefact"
  if up_to_date "$artefact" "$directory" "$compiler"; then return; fi
  if ! case $language in rust) build_rust "$directory" "$artefact" ;; go) build_go "$directory" "$artefact" ;; esac; then
    rm -f "$artefact.new"
    say "${directory#"$ROOT"/}: does not build"
    return 1
  fi
  touch "$artefact.new"                 # cargo and go leave an unchanged result with its old time
  mv -f "$artefact.new" "$artefact"
  say "${artefact#"$ROOT"/} ($(wc -c < "$artefact" | tr -d ' ') bytes, $((SECONDS - start)) s)"
}

mkdir -p "$OUT"
if command -v flock > /dev/null 2>&1; then exec 9> "$OUT/.lock"; flock 9; fi

directories=()
if [ $# -gt 0 ]; then
  for directory; do
    if [ ! -f "$directory/Cargo.toml" ] && [ ! -f "$directory/go.mod" ]; then
      say "$directory: neither a Cargo.toml nor a go.mod there" >&2
      exit 64
    fi
    directories+=("$(cd "$directory" && pwd)")
  done
else
  for directory in "$ROOT"/examples/*/ "$ROOT"/plugins/*/; do
    if [ -f "$directory/Cargo.toml" ] || [ -f "$directory/go.mod" ]; then directories+=("${directory%/}"); fi
  done
  # The server runs all it finds in this folder, so what is no longer built must go.
  for artefact in "$OUT"/*.wasm; do
    known=0
    for directory in "${directories[@]}"; do
      if [ "$artefact" = "$(artefact_of "$directory")" ]; then known=1; fi
    done
    if [ $known = 0 ]; then rm -f "$artefact" "${artefact%.wasm}.plugin.toml"; fi
  done
fi

failed=0
for directory in "${directories[@]}"; do build "$directory" || failed=1; done
exit $failed
