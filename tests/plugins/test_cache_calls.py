#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Plugins of both SDKs, built by their compilers, that list, pin, evict, load and keep state in a real
server with storage below it, while a client stores there.

It needs a built server and the compilers of plugin-sdk/toolchain.sh; what is missing is said.
"""

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
import unittest
import urllib.error
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import pages

HERE = Path(__file__).resolve().parent
LANGUAGES = ["rust", "go"]


class CacheCalls(unittest.TestCase):
    def test_both_sdks_do_everything_with_the_cache(self):
        if pages.binary() is None:
            self.skipTest("there is no built server: cargo build")
        for language in LANGUAGES:
            if not pages.compiler(language):
                self.skipTest(f"there is no compiler: plugin-sdk/toolchain.sh {language}")
        directory = Path(tempfile.mkdtemp(prefix="stockade-cache-calls-"))
        self.addCleanup(shutil.rmtree, directory, ignore_errors=True)
        folders = [HERE / f"warden-{language}" for language in LANGUAGES]
        subprocess.run([pages.ROOT / "plugin-sdk/build.sh", *folders], check=True)
        plugins = directory / "plugins"
        plugins.mkdir()
        for language in LANGUAGES:
            for end in ("wasm", "plugin.toml"):
                shutil.copy(pages.ROOT / f"target/plugins/warden_{language}.{end}", plugins)
        storage = {"type": "fs", "base_path": str(directory / "storage")}
        command = [pages.binary(), "serve", "--l1-size-gb", "0.25", "--runtime-plugin-locations", plugins]
        command += ["--l2-adapter", json.dumps(storage), "--state-dir", directory / "state"]
        rounds = dict.fromkeys(LANGUAGES, 0)
        for _life in range(2):
            with pages.Server(command, directory) as server:
                # Beside the load, compiling could take longer than it may.
                self.until_they_run(server)
                # Nothing can be loaded that no worker has a layout for, so one stays.
                with self.client(server, "ping", 600):
                    for language in LANGUAGES:
                        report, rounds[language] = self.report(server, language, rounds[language])
                        done = (report["pinned"], report["evicted"], report["loaded"])
                        self.assertEqual(done, (1, 1, 1))
                        self.assertTrue(report["is_shown_pinned"])
                self.assertEqual(server.stop(), 0)

    def until_they_run(self, server):
        deadline = time.monotonic() + pages.PATIENCE_SECONDS
        while True:
            with urllib.request.urlopen(f"{server.http}/v1/plugins") as response:
                states = {plugin["name"]: plugin["state"] for plugin in json.loads(response.read())["plugins"]}
            if list(states.values()) == ["running"] * len(LANGUAGES):
                return
            if time.monotonic() > deadline or "refused" in states.values():
                self.fail(f"{states}\n{server.text()}")
            time.sleep(0.1)

    def report(self, server, language, rounds):
        """What the plugin did, once what it evicted had been written down and the client left it alone, and
        how many rounds it has counted: each more than the one before, also in another life of the server."""
        # The load ends, since storage is slower: while it goes on, what the pool holds is written down
        # only about when it is evicted, and a round that finds both may never come.
        with self.client(server, "store", 2):
            return self.first_whole_round(server, language, rounds)

    @contextlib.contextmanager
    def client(self, server, workload, seconds):
        command = [pages.binary(), "bench", "--url", f"tcp://{server.zmq}", "--workload", workload]
        command += ["--turns", "1", "--seconds", str(seconds), "--tokens", "4096", "--chunk-kib", "64", "--json"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            try:
                yield
            finally:
                process.kill()

    def first_whole_round(self, server, language, rounds):
        deadline = time.monotonic() + pages.PATIENCE_SECONDS
        while True:
            url = f"{server.http}/v1/plugins/warden_{language}/call/round"
            try:
                request = urllib.request.Request(url, data=b"", method="POST")
                with urllib.request.urlopen(request) as response:
                    last = json.loads(response.read())
                rounds += 1
                self.assertEqual(last["rounds"], rounds)
                if last["pinned"] and last["is_shown_pinned"] and last["evicted"] and last["loaded"]:
                    return last, rounds
            except urllib.error.HTTPError as error:
                last = error.read().decode()
            if time.monotonic() > deadline:
                self.fail(f"{language}: {last}\n{server.text()}")
            time.sleep(0.1)


if __name__ == "__main__":
    unittest.main()
