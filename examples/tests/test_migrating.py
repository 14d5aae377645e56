#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Runs every program of docs/plugins/migrating.md beside one server, and compares what they say.

It needs a built server; without compilers for the sandbox, or a Python for it
(STOCKADE_TEST_PYTHON_WASM), the programs that need them are left out, and it says so.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = ROOT / "docs/plugins/migrating.md"
EXAMPLES = ROOT / "examples"
PATIENCE_SECONDS = 120


def programs():
    """File name to text, of all blocks of the page that are files."""
    blocks = re.findall(r"<!-- file: (\S+) -->\n```\w+\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return dict(blocks)


def server():
    target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    for profile in ("debug", "release"):
        if (target / profile / "stockade").exists():
            return target / profile / "stockade"
    return None


def compilers():
    script = ROOT / "plugin-sdk/toolchain.sh"
    return Path(subprocess.check_output([script, "--bin"], text=True).strip())


class Migrating(unittest.TestCase):
    def setUp(self):
        self.directory = Path(tempfile.mkdtemp(prefix="stockade-migrating-"))
        self.addCleanup(shutil.rmtree, self.directory, ignore_errors=True)
        self.plugins = self.directory / "plugins"
        for name, text in programs().items():
            path = self.directory / name
            if "/" not in name:
                path = self.plugins / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    def build(self):
        """Builds what there are compilers for; the names of the modules."""
        shutil.copy(EXAMPLES / "mp-plugin-rust/src/stop.rs", self.directory / "watch-rust/src")
        shutil.copy(EXAMPLES / "mp-heartbeat-go/stop_wasip1.go", self.directory / "watch-go")
        output = ROOT / "target/migrating"
        built = []
        for name, tool, arguments, product in (
            (
                "watch-rust",
                "wasm-cargo",
                ["build", "--release", "--quiet", "--target-dir", str(output)],
                output / "wasm32-wasip1/release/watch-rust.wasm",
            ),
            (
                "watch-go",
                "wasm-go",
                ["build", "-o", str(self.directory / "go.wasm"), "."],
                self.directory / "go.wasm",
            ),
        ):
            compiler = compilers() / tool
            if not compiler.exists():
                print(f"\nskipped: {name} needs {tool} of plugin-sdk/toolchain.sh", file=sys.stderr)
                continue
            subprocess.run([compiler, *arguments], cwd=self.directory / name, check=True)
            plugin = name.replace("-", "_")
            shutil.copy(product, self.plugins / f"{plugin}.wasm")
            built.append(plugin)
        return built

    def run_beside_a_server(self, names, flags):
        """Starts the server, waits for two ticks of each plugin, stops it; the log."""
        log = self.directory / "log"
        with open(log, "w") as output:
            process = subprocess.Popen(
                [server(), "serve", "--port", "0", "--http-port", "0", "--l1-size-gb", "0.0625"]
                + ["--chunk-size", "16", "--plugin-cache-dir", self.directory / "cache"]
                + ["--runtime-plugin-config", '{"watch.seconds": 0.2}']
                + ["--runtime-plugin-locations", self.plugins, *flags],
                stderr=output,
            )
        try:
            deadline = time.monotonic() + PATIENCE_SECONDS
            while not all(f"[{name}] tick 1\n" in log.read_text() for name in names):
                self.assertIsNone(process.poll(), log.read_text())
                self.assertLess(time.monotonic(), deadline, log.read_text())
                time.sleep(0.02)
            process.send_signal(signal.SIGTERM)
            self.assertEqual(process.wait(timeout=30), 0)
        finally:
            process.kill()
            process.wait()
        return log.read_text()

    def check(self, log, names):
        port = re.search(r"serving on tcp://[^:]+:(\d+)", log)[1]
        for name in names:
            for line in f"port {port}, chunks of 16 tokens", "tick 0", "tick 1", "stopping":
                self.assertIn(f"[{name}] {line}\n", log)
            self.assertIn(f"plugin `{name}` exited with code 0", log)

    def test_all_programs_do_the_same(self):
        if server() is None:
            self.skipTest("there is no built server: cargo build")
        names = ["watch_sh", "watch_py", "watch_wasi", *self.build()]
        self.check(self.run_beside_a_server(names, []), names)

    def test_the_python_program_runs_in_the_sandbox_too(self):
        python = os.environ.get("STOCKADE_TEST_PYTHON_WASM")
        if server() is None or not python:
            self.skipTest("STOCKADE_TEST_PYTHON_WASM names no python.wasm, or there is no built server")
        for path in self.plugins.iterdir():
            if path.name != "watch_wasi.py":
                path.unlink()
        # A directory below /tmp is a plugin's own; no process may run, so it is the sandbox.
        flags = ["--native-plugins", "deny", "--python-wasm", python]
        self.check(self.run_beside_a_server(["watch_wasi"], flags), ["watch_wasi"])


if __name__ == "__main__":
    unittest.main()
