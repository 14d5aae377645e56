#!/usr/bin/env bash
# run.sh [SECONDS [TARGET...]]
#
# Runs each fuzz target for SECONDS (300) from the seeds kept here. A target fails when it panics,
# takes more than 10 s, holds over 1 GiB, or allocates 48 MiB at once for an input of at most
# 64 KiB. Needs cargo-fuzz (cargo install --locked cargo-fuzz) and a C++ compiler.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")"
seconds=${1:-300}
shift || true
targets=("$@")
if [ ${#targets[@]} = 0 ]; then targets=(decode_request pickle zmtp_decoder); fi

# The sanitizer's flags are unstable; the pinned compiler takes them with this.
export RUSTC_BOOTSTRAP=1
export ASAN_OPTIONS="detect_leaks=0 ${ASAN_OPTIONS:-}"
for target in "${targets[@]}"; do
  mkdir -p "corpus/$target"
  cargo fuzz run --fuzz-dir . "$target" "corpus/$target" "seeds/$target" -- \
    -max_total_time="$seconds" -timeout=10 -rss_limit_mb=1024 -malloc_limit_mb=48 -max_len=65536 -print_final_stats=1
done
