#!/bin/sh
# Cargo calls this with the compiler and its arguments for the crates of this workspace. They get
# the counters that libFuzzer reads; their dependencies stay as every other build has them. The
# flags are those that cargo-fuzz passes, without a sanitizer and so fit for a stable compiler.
case " $* " in
  *" --crate-name build_script_"*) exec "$@" ;;
esac
exec "$@" -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
  -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
  -Cllvm-args=-sanitizer-coverage-trace-compares
