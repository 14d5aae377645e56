#!/usr/bin/env bash
# hardening.sh [--stack-protector] PROGRAM...
#
# Checks that programs are built as hardened as their toolchain can: position independent, the
# relocation table read-only before main (full RELRO), no stack and no segment that is both writable
# and executable, no text relocations, no library path of the build machine.
#
# rustc puts no stack protectors in: safe code cannot write beyond an array, and an overflow of the
# stack is caught by the guard page and the probes that it does put in. The C code in a release
# (the allocator, parts of the cryptography) has them when CFLAGS asks for them, as the Dockerfile
# does; --stack-protector checks that some code calls their handler.
set -euo pipefail

protected=false
if [ "${1-}" = --stack-protector ]; then protected=true && shift; fi
[ $# -gt 0 ] || { echo "give the programs to check" >&2; exit 64; }
command -v readelf > /dev/null || { echo "there is no readelf (Debian: binutils)" >&2; exit 1; }
failed=0
for program in "$@"; do
  headers=$(readelf --wide --file-header --program-headers --dynamic "$program")
  check() {                             # NAME PATTERN [absent]
    if grep --quiet --extended-regexp "$2" <<< "$headers"; then found=true; else found=false; fi
    if [ "${3-}" = absent ]; then wanted=false; else wanted=true; fi
    if [ $found = $wanted ]; then
      echo "ok     $program: $1"
    else
      echo "MISSED $program: $1"
      failed=1
    fi
  }
  check "position independent" 'Type: +DYN|\(FLAGS_1\).* PIE'
  check "relocations read-only" 'GNU_RELRO'
  check "bound before main" 'BIND_NOW|\(FLAGS_1\).* NOW'
  check "a stack that cannot run" 'GNU_STACK +[^ ]+ [^ ]+ [^ ]+ [^ ]+ [^ ]+ RW '
  check "no segment to write and run" '(LOAD|GNU_STACK) .* RWE ' absent
  check "no text relocations" 'TEXTREL' absent
  if $protected; then
    headers+=$(readelf --wide --dyn-syms "$program")
    check "stack protectors in C code" '__stack_chk_fail'
  fi
  check "no library path" '\((RPATH|RUNPATH)\)' absent
done
exit $failed
