#!/usr/bin/env bash
# Runs every test: the crates', the examples', and last the product's from outside.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '\n-- %s\n' "$*"; }

# Every call of cargo names the whole workspace, or features differ between them and much is compiled twice.
say "server, keeper and tests"
cargo build --workspace --bins --tests --locked

# Where npm is, Python plugins are tried in the sandbox too; the tests say when they were not.
if [ -z "${STOCKADE_TEST_PYTHON_WASM-}" ] && python=$(plugin-sdk/python-wasm.sh); then
  export STOCKADE_TEST_PYTHON_WASM=$python
fi

# moto, the S3-compatible server of tests; they say loudly when there is none.
venv=${CARGO_TARGET_DIR:-target}/plugins-venv
python=python3
if python3 -m venv "$venv" && "$venv/bin/pip" install --quiet --requirement tests/plugins/requirements.txt; then
  python=$venv/bin/python
  STOCKADE_TEST_MOTO=${STOCKADE_TEST_MOTO:-$(realpath "$venv/bin/moto_server")}
  export STOCKADE_TEST_MOTO
else
  echo "THERE IS NO MOTO: neither the second tier in S3 nor the uploader is tested"
fi

# libzmq with CURVE, through pyzmq.
traces=${CARGO_TARGET_DIR:-target}/traces-venv libzmq=
[[ -x $traces/bin/python ]] || python3 -m venv "$traces"
if "$traces/bin/pip" install --quiet --requirement tests/traces/requirements.txt; then
  libzmq=$(realpath -s "$traces/bin/python")
  export STOCKADE_TEST_PYTHON=${STOCKADE_TEST_PYTHON:-$libzmq}
else
  echo "NEITHER TRACES NOR LIBZMQ ARE TESTED: the packages of tests/traces/requirements.txt cannot be had"
fi

say "crates"
# All but those of stockade-tests, which come last.
mapfile -t tests < <(cargo metadata --no-deps --format-version 1 --locked | python3 -c '
import json, sys
packages = json.load(sys.stdin)["packages"]
targets = (target for package in packages if package["name"] != "stockade-tests" for target in package["targets"])
for target in targets:
    if "test" in target["kind"] and "required-features" not in target:
        print("--test", target["name"], sep="\n")')
cargo test --workspace --lib --bins "${tests[@]}" --locked
cargo test --workspace --doc --locked

say "example plugins: Python and Bash"
python3 -m unittest discover -s examples/tests

say "the SDK, example plugins and shipped plugins: Rust, natively"
for plugin in plugin-sdk/rust plugin-sdk/templates/rust examples/*/ plugins/*/; do
  if [[ -f $plugin/Cargo.toml ]]; then
    (cd "$plugin" && cargo test --locked --target-dir "$OLDPWD/target/guests-native")
  fi
done

say "the SDK, example plugins and shipped plugins: Go, natively"
if command -v go > /dev/null 2>&1; then
  for plugin in plugin-sdk/go plugin-sdk/templates/go examples/*/ plugins/*/; do
    if [[ -f $plugin/go.mod ]]; then (cd "$plugin" && go vet ./... && go test ./...); fi
  done
else
  echo "there is no go, so tests in Go are left out"
fi

say "the dashboard in Chromium"
if command -v chromium > /dev/null 2>&1 && command -v chromedriver > /dev/null 2>&1; then
  venv=${CARGO_TARGET_DIR:-target}/dashboard-venv
  [[ -x $venv/bin/python ]] || python3 -m venv "$venv"
  "$venv/bin/pip" install --quiet --requirement tests/ui/requirements.txt
  "$venv/bin/python" tests/ui/test_dashboard.py
else
  echo "THE DASHBOARD IS NOT TESTED: there is no chromium with chromedriver (Debian: chromium-driver)"
fi

say "traces, with a receiver of OpenTelemetry's own"
if [[ -n $libzmq ]]; then
  "$libzmq" tests/traces/test_traces.py
fi

say "users by password and by key, with libzmq"
if [[ -n $libzmq ]]; then
  "$libzmq" tests/users/test_users.py "${CARGO_TARGET_DIR:-target}/debug/stockade"
fi

say "pages about plugins, and the plugins that come with the server"
"$python" -m unittest discover --start-directory tests/plugins --verbose

say "packaging"
packaging/check.sh

say "the programs' hardening"
tests/hardening.sh "${CARGO_TARGET_DIR:-target}/debug/stockade" "${CARGO_TARGET_DIR:-target}/debug/stockade-keeper"

say "no phone-home"
tests/no_phone_home.sh "${CARGO_TARGET_DIR:-target}/debug/stockade"

# 50 rounds, the same each time; the head of tests/chaos/main.rs says how to run more, and one again.
say "chaos"
STOCKADE_CHAOS_SEED=${STOCKADE_CHAOS_SEED:-1} cargo test --workspace --test chaos --locked

say "the product from outside"
cargo test --workspace --test suite --locked
