#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Does what docs/plugins/first-plugin-{rust,go}.md say, from an empty directory to a running server.

It needs a built server and the compilers of plugin-sdk/toolchain.sh; what is missing is said.
"""

import shutil
import sys
import tempfile
import unittest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import pages


class FirstPlugins(unittest.TestCase):
    def play(self, language, tool):
        if pages.binary() is None:
            self.skipTest("there is no built server: cargo build")
        if not pages.compiler(language) or shutil.which(tool) is None:
            self.skipTest(f"there is no compiler: plugin-sdk/toolchain.sh {language}")
        directory = Path(tempfile.mkdtemp(prefix="stockade-first-plugin-"))
        self.addCleanup(shutil.rmtree, directory, ignore_errors=True)
        page = pages.ROOT / f"docs/plugins/first-plugin-{language}.md"
        # As many as the page has; fewer means that the reader of pages lost some.
        self.assertEqual(pages.play(page, directory), page.read_text().count("<!-- run -->"))

    def test_rust(self):
        self.play("rust", "cargo")

    def test_go(self):
        self.play("go", "go")

    def test_both_pages_have_the_same_steps(self):
        headings = [
            [line for line in page.read_text().splitlines() if line.startswith("## ")]
            for page in sorted((pages.ROOT / "docs/plugins").glob("first-plugin-*.md"))
        ]
        self.assertEqual(headings[0], headings[1])


if __name__ == "__main__":
    unittest.main()
