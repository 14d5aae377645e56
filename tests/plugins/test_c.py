#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Compiles plugin-sdk/c/hello.c as its comment says, and runs its test file in the sandbox.

It needs a built server and `plugin-sdk/toolchain.sh c`; what is missing is said.
"""

import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import pages

SDK = pages.ROOT / "plugin-sdk/c"


class HelloFromC(unittest.TestCase):
    def test_it_builds_and_does_what_its_test_says(self):
        folder = subprocess.check_output([pages.ROOT / "plugin-sdk/toolchain.sh", "--bin"], text=True)
        compiler = Path(folder.strip()) / "wasm-cc"
        if not compiler.exists() or pages.binary() is None:
            self.skipTest("there is no compiler (plugin-sdk/toolchain.sh c), or no built server")
        directory = Path(tempfile.mkdtemp(prefix="stockade-c-"))
        self.addCleanup(shutil.rmtree, directory, ignore_errors=True)
        module = directory / "hello_c.wasm"
        flags = ["-Os", "-Wall", "-Wextra", "-Werror", "-mexec-model=reactor"]
        subprocess.run([compiler, *flags, "-o", module, SDK / "hello.c"], check=True)
        for name in ("hello_c.plugin.toml", "hello_c.test.toml"):
            shutil.copy(SDK / name, directory)
        done = subprocess.run(
            [pages.binary(), "plugin", "test"], cwd=directory, capture_output=True, text=True
        )
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        self.assertIn("3 steps passed", done.stdout)


if __name__ == "__main__":
    unittest.main()
