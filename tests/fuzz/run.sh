#!/usr/bin/env bash
# run.sh [--seconds S | --executions N] [--jobs J] [--record] [--sanitizer] [TARGET...]
#
# Runs each fuzz target for S seconds (60) or N executions, J at a time (1), from the seeds kept
# here and what earlier runs found (corpus/). A target fails when it panics, takes more than 10 s
# for an input, or holds more than 48 MiB. The input that did it stays in artifacts/.
#
# The targets are built with coverage counters and without a sanitizer: the crates under test have
# no unsafe code, and a sanitizer makes them several times slower. Dependencies are those of a
# development build, so overflow checks and debug assertions are on. --sanitizer builds everything
# anew with AddressSanitizer all the same.
#
# --record adds a line for each target to docs/benchmarks/fuzz.txt. Needs a C++ compiler.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
here=tests/fuzz
all=(decode_request pickle zmtp_decoder manifest config_file log_stream l2_names)
bound=-max_total_time=60 jobs=1 record=false sanitizer=false targets=()
while [ $# -gt 0 ]; do
  case $1 in
    --seconds) bound=-max_total_time=${2:?} && shift ;;
    --executions) bound=-runs=${2:?} && shift ;;
    --jobs) jobs=${2:?} && shift ;;
    --record) record=true ;;
    --sanitizer) sanitizer=true ;;
    --*) echo "$1 is none of --seconds, --executions, --jobs, --record and --sanitizer" >&2 && exit 64 ;;
    *) targets+=("$1") ;;
  esac
  shift
done
[ ${#targets[@]} -gt 0 ] || targets=("${all[@]}")

build=() features=stockade-fuzz/libfuzzer
for target in "${targets[@]}"; do
  build+=(--bin "fuzz_$target")
  # These link the server, and with it wasmtime, whose build takes minutes.
  case $target in manifest | config_file | log_stream) features=stockade-fuzz/server ;; esac
done
programs=${CARGO_TARGET_DIR:-target}/debug
if $sanitizer; then
  # The flag is unstable; this lets the pinned compiler take it. --target keeps it from build scripts.
  export RUSTC_BOOTSTRAP=1 RUSTFLAGS=-Zsanitizer=address ASAN_OPTIONS="detect_leaks=0 ${ASAN_OPTIONS:-}"
  triple=$(rustc -vV | sed -n 's/^host: //p')
  build+=(--target "$triple" --target-dir "${CARGO_TARGET_DIR:-target}/fuzz-sanitizer")
  programs=${CARGO_TARGET_DIR:-target}/fuzz-sanitizer/$triple/debug
fi
RUSTC_WORKSPACE_WRAPPER=$PWD/$here/instrument.sh CARGO_INCREMENTAL=0 CARGO_PROFILE_DEV_OPT_LEVEL=3 \
  cargo build --workspace --locked --features "$features" "${build[@]}"

fuzz() {                                # TARGET: leaves TARGET.line in artifacts/
  local target=$1 start=$SECONDS status=clean longest options
  local corpus=$here/corpus/$target seeds=$here/seeds/$target log=$here/artifacts/$target.log
  mkdir -p "$corpus" "$here/artifacts/$target" "$seeds"
  # Long inputs cost time and find what short ones find; pickles and token ids need some length.
  case $target in
    decode_request | pickle) longest=16384 ;;
    # These look at each byte on its own, with limits small enough for this.
    zmtp_decoder) longest=512 ;;
    log_stream) longest=128 ;;
    *) longest=2048 ;;
  esac
  options=(-timeout=10 -rss_limit_mb=2048 "-max_len=$longest" -print_final_stats=1 "-artifact_prefix=$here/artifacts/$target/")
  [ ! -f "$here/$target.dict" ] || options+=("-dict=$here/$target.dict")
  "$programs/fuzz_$target" "$bound" "${options[@]}" "$corpus" "$seeds" > "$log" 2>&1 || status=FAILED
  local seconds=$((SECONDS - start)) executions edges peak
  executions=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
  edges=$(grep -o 'cov: [0-9]*' "$log" | tail -n 1 | cut -d ' ' -f 2)
  peak=$(sed -n 's/^stat::peak_rss_mb: *//p' "$log")
  printf '%s %-14s %11s executions in %6d s, %7d a second; %5s edges, %5d inputs kept, %4s MiB; %s\n' "$(date -u +%F)" \
    "$target" "${executions:-?}" "$seconds" $((${executions:-0} / (seconds > 0 ? seconds : 1))) "${edges:-?}" \
    "$(find "$corpus" "$seeds" -type f | wc -l)" "${peak:-?}" "$status" | tee "$here/artifacts/$target.line"
}

for target in "${targets[@]}"; do
  while [ "$(jobs -rp | wc -l)" -ge "$jobs" ]; do wait -n || true; done
  fuzz "$target" &
done
wait
failed=0
for target in "${targets[@]}"; do
  if $record; then cat "$here/artifacts/$target.line" >> docs/benchmarks/fuzz.txt; fi
  if grep -q 'FAILED$' "$here/artifacts/$target.line"; then
    failed=1
    tail -n 60 "$here/artifacts/$target.log"
  fi
done
if [ $failed = 1 ]; then
  echo "$programs/fuzz_TARGET with the input in $here/artifacts/TARGET shows a failure again" >&2
fi
exit $failed
