#!/usr/bin/env bash
# sbom.sh FILE
#
# Writes the software bill of materials of the server to FILE, as CycloneDX 1.5 in JSON: every crate
# that is linked into `stockade` or takes part in its build, with version, licence, package URL and
# checksum, for the platform it runs on. Installs cargo-cyclonedx below target/ where it is missing.
set -euo pipefail

file=$(realpath --canonicalize-missing "${1:?give a file for the bill of materials}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
tools=${CARGO_TARGET_DIR:-target}/tools
PATH=$(realpath --canonicalize-missing "$tools")/bin:$PATH
if ! command -v cargo-cyclonedx > /dev/null 2>&1; then
  cargo install --quiet --locked --debug cargo-cyclonedx@0.5.9 --root "$tools" --target-dir "$tools/build"
  rm -rf "$tools/build"
fi

# It writes beside each Cargo.toml of the workspace; the copy keeps it from the checkout.
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cargo metadata --format-version 1 --no-deps | python3 -c '
import json, pathlib, shutil, sys
copy, metadata = pathlib.Path(sys.argv[1]), json.load(sys.stdin)
root = pathlib.Path(metadata["workspace_root"])
for package in metadata["packages"]:
    source = pathlib.Path(package["manifest_path"]).parent
    shutil.copytree(source, copy / source.relative_to(root), dirs_exist_ok=True, ignore=shutil.ignore_patterns("target", "corpus", "artifacts"))
for name in ("Cargo.toml", "Cargo.lock", "rust-toolchain.toml"):
    shutil.copy(root / name, copy)
' "$copy"
SOURCE_DATE_EPOCH=$(git log -1 --format=%ct 2> /dev/null || date +%s)
export SOURCE_DATE_EPOCH
(cd "$copy" && cargo cyclonedx --quiet --format json --spec-version 1.5 --override-filename stockade.cdx)
mkdir -p "$(dirname "$file")"
# Where it was made is nobody's business, and would make it differ from the next one.
sed "s#path+file://$copy#path+file:///stockade#g" "$copy/host/stockade.cdx.json" > "$file"

python3 - "$file" << 'PYTHON'
import json, sys
bill = json.load(open(sys.argv[1]))
components = bill["components"]
ours = {"stockade-cache", "stockade-l2", "stockade-sandbox", "stockade-transport", "stockade-wire"}
names = {component["name"] for component in components}
missing = (ours | {"tokio", "wasmtime"}) - names
unlicensed = [component["name"] for component in components if not component.get("licenses")]
unhashed = [component["name"] for component in components if not component.get("hashes") and component["name"] not in ours]
for what, found in (("not listed", missing), ("without licence", unlicensed), ("without checksum", unhashed)):
    if found:
        sys.exit(f"{what}: {', '.join(sorted(found))}")
print(f"{sys.argv[1]}: {len(components)} components, CycloneDX {bill['specVersion']}")
PYTHON
