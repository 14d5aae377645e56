#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Compiles every recipe of docs/plugins/cookbook.md for the sandbox, in Rust and in Go, and runs each there
with the manifest of its recipe.

It needs the compilers of plugin-sdk/toolchain.sh, and a built server to run them; what is missing is said.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import pages

CARGO = """[package]
name = "{name}"
version = "0.1.0"
edition = "2024"

[dependencies]
serde_json = "1"
stockade-plugin = {{ path = "{sdk}" }}
"""


class Cookbook(unittest.TestCase):
    def setUp(self):
        self.directory = Path(tempfile.mkdtemp(prefix="stockade-cookbook-"))
        self.addCleanup(shutil.rmtree, self.directory, ignore_errors=True)
        self.recipes = set()
        for name, text, is_file in pages.blocks(pages.ROOT / "docs/plugins/cookbook.md"):
            self.assertTrue(is_file)
            path = self.directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            self.recipes.add(name.split("/")[0])

    def compile(self, tool, arguments, directory):
        folder = subprocess.check_output([pages.ROOT / "plugin-sdk/toolchain.sh", "--bin"], text=True)
        target = str(pages.ROOT / "target/pages")
        done = subprocess.run(
            [Path(folder.strip()) / tool, *arguments],
            cwd=directory,
            env={**os.environ, "CARGO_TARGET_DIR": target},
            capture_output=True,
            text=True,
        )
        self.assertEqual(done.returncode, 0, f"{directory}\n{done.stderr}")

    def run_in_sandbox(self, recipe, module):
        """What the recipe's manifest grants is what it needs, and it runs until it is told to end."""
        if pages.binary() is None:
            return
        place = Path(tempfile.mkdtemp(dir=self.directory))
        name = recipe.replace("-", "_")
        shutil.copy(module, place / f"{name}.wasm")
        manifest = self.directory / recipe / "plugin.toml"
        if manifest.exists():
            shutil.copy(manifest, place / f"{name}.plugin.toml")
        for command in (["check", "--strict"], ["run", "--seconds", "0.5"]):
            done = subprocess.run(
                [pages.binary(), "plugin", *command, place / f"{name}.wasm"],
                env={**os.environ, "XDG_CACHE_HOME": str(self.directory / "cache")},
                capture_output=True,
                text=True,
            )
            self.assertEqual(done.returncode, 0, f"{recipe} {command}\n{done.stdout}\n{done.stderr}")

    def test_rust(self):
        if not pages.compiler("rust"):
            self.skipTest("there is no compiler: plugin-sdk/toolchain.sh rust")
        for recipe in self.recipes:
            manifest = CARGO.format(name=recipe, sdk=pages.ROOT / "plugin-sdk/rust")
            if (self.directory / recipe / "src/lib.rs").exists():
                manifest += '\n[lib]\ncrate-type = ["cdylib"]\n'
            (self.directory / recipe / "Cargo.toml").write_text(manifest)
        members = ", ".join(f'"{recipe}"' for recipe in sorted(self.recipes))
        (self.directory / "Cargo.toml").write_text(f'[workspace]\nresolver = "3"\nmembers = [{members}]\n')
        self.compile("wasm-cargo", ["build", "--quiet"], self.directory)
        built = pages.ROOT / "target/pages/wasm32-wasip1/debug"
        for recipe in self.recipes:
            # A library's name has no dashes, a program's has.
            modules = [built / f"{name}.wasm" for name in (recipe, recipe.replace("-", "_"))]
            self.run_in_sandbox(recipe, next(module for module in modules if module.exists()))

    def test_go(self):
        if not pages.compiler("go"):
            self.skipTest("there is no compiler: plugin-sdk/toolchain.sh go")
        (self.directory / "go.mod").write_text(
            "module cookbook\n\ngo 1.24\n\nrequire stockade.dev/plugin v0.0.0\n\n"
            f"replace stockade.dev/plugin => {pages.ROOT}/plugin-sdk/go\n"
        )
        for recipe in self.recipes:
            is_reactor = "plugin/reactor" in (self.directory / recipe / "main.go").read_text()
            mode = "c-shared" if is_reactor else "default"
            self.compile("wasm-go", ["build", f"-buildmode={mode}", "-o", "out.wasm", "."], self.directory / recipe)
            self.run_in_sandbox(recipe, self.directory / recipe / "out.wasm")
        self.assertGreaterEqual(len(self.recipes), 6)


if __name__ == "__main__":
    unittest.main()
