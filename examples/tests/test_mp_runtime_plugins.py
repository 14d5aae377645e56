#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Tests of the two scripts: python3 -m unittest discover -s examples/tests

They lie beside the scripts' folder because the server runs every script inside it.
"""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parent.parent / "mp_runtime_plugins"
CONFIG = {
    "mp_config": {"host": "127.0.0.1", "port": 5555, "chunk_size": 256},
    "storage_manager_config": {
        "l1_manager_config": {"memory_config": {"size_in_bytes": 3 << 29}},
        "eviction_config": {"eviction_policy": "LRU", "trigger_watermark": 0.8},
    },
    "obs_config": {"enabled": True, "metrics_enabled": True, "tracing_enabled": False},
    "runtime_plugin_extra_config": {"mp_plugin.heartbeat_seconds": 7},
}
PATIENCE_SECONDS = 20


def load(name):
    sys.dont_write_bytecode = True  # no __pycache__ in a folder that the server searches
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


mp_plugin = load("mp_plugin")


class Core(unittest.TestCase):
    def test_a_full_config_is_summed_up_in_three_lines(self):
        self.assertEqual(
            mp_plugin.summary(CONFIG),
            [
                "MP server: host=127.0.0.1 port=5555 chunk_size=256",
                "Storage: L1=1.5GB eviction=LRU watermark=0.8",
                "Observability: enabled=true metrics=true tracing=false",
            ],
        )

    def test_what_is_missing_null_or_of_another_type_is_a_question_mark(self):
        odd = {
            "mp_config": [1],
            "obs_config": {"enabled": None},
            "storage_manager_config": {"l1_manager_config": {"memory_config": {"size_in_bytes": True}}},
        }
        for config in ({}, odd):
            self.assertEqual(
                mp_plugin.summary(config),
                [
                    "MP server: host=? port=? chunk_size=?",
                    "Storage: L1=?GB eviction=? watermark=?",
                    "Observability: enabled=? metrics=? tracing=?",
                ],
            )

    def test_only_a_json_object_is_a_config(self):
        self.assertEqual(mp_plugin.parse(json.dumps(CONFIG)), (CONFIG, None))
        bad = {
            "": "is empty",
            " \n": "is empty",
            "[1]": "not a JSON object",
            "{": "is not JSON",
            "[" * 100_000: "is not JSON",
        }
        for text, problem in bad.items():
            config, said = mp_plugin.parse(text)
            self.assertEqual(config, {})
            self.assertIn(problem, said)

    def test_the_interval_comes_from_the_extra_config_or_its_section(self):
        self.assertEqual(mp_plugin.interval('{"mp_plugin.heartbeat_seconds": 0.5}', CONFIG), (0.5, None))
        self.assertEqual(mp_plugin.interval('{"other": 1}', CONFIG), (30.0, None))
        self.assertEqual(mp_plugin.interval("", CONFIG), (7.0, None))
        self.assertEqual(mp_plugin.interval("", {}), (30.0, None))

    def test_an_unusable_interval_is_named(self):
        for value in ("0", "-1", "0.09", "86401", "NaN", '"5"', "true", "[]"):
            seconds, problem = mp_plugin.interval(f'{{"mp_plugin.heartbeat_seconds": {value}}}', {})
            self.assertEqual(seconds, 30.0)
            self.assertEqual(problem, "mp_plugin.heartbeat_seconds is not a number from 0.1 to 86400: using 30")
        self.assertIn("EXTRA_CONFIG is not JSON", mp_plugin.interval("{", {})[1])


class Running(unittest.TestCase):
    """Runs a script as the server does and reads its lines."""

    def start(self, script, config, extra="", path=None):
        environment = {
            "PATH": path or os.environ["PATH"],
            "LMCACHE_RUNTIME_PLUGIN_CONFIG": config if isinstance(config, str) else json.dumps(config),
            "LMCACHE_RUNTIME_PLUGIN_EXTRA_CONFIG": extra,
        }
        interpreter = sys.executable if script.endswith(".py") else shutil.which("bash")
        process = subprocess.Popen(
            [interpreter, SCRIPTS / script],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # A shell's background job, as these tests may be, ignores SIGINT; Bash cannot trap that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        self.addCleanup(process.stdout.close)
        self.addCleanup(process.wait, PATIENCE_SECONDS)
        self.addCleanup(self.kill_group, process)
        return process

    def kill_group(self, process):
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return  # it stopped and left nothing behind

    def lines_until(self, process, last):
        lines = []
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            if last in line:
                return lines
        self.fail(f"no line with {last!r} in {lines}")

    def assert_stops(self, process, number):
        process.send_signal(number)
        asked = time.monotonic()
        rest = process.stdout.read()
        self.assertEqual(process.wait(PATIENCE_SECONDS), 0)
        self.assertLess(time.monotonic() - asked, 5, "the heartbeat interval is 30 s: it must not be waited for")
        self.assertIn(f"Received {signal.Signals(number).name}, exiting", rest)
        with self.assertRaises(ProcessLookupError, msg="a process of its own outlived it"):
            os.killpg(process.pid, 0)

    def test_scripts_show_the_settings_and_stop_when_told(self):
        expected = {
            "mp_plugin.py": ["[mp_plugin] Started"]
            + [f"[mp_plugin] {line}" for line in mp_plugin.summary(CONFIG)]
            + ["[mp_plugin] heartbeat #0"],
            "mp_heartbeat.sh": [
                "[mp_heartbeat] Started",
                "[mp_heartbeat] MP server: host=127.0.0.1 port=5555 chunk_size=256 eviction=LRU",
                "[mp_heartbeat] heartbeat #0",
            ],
        }
        for script, lines in expected.items():
            for number in (signal.SIGTERM, signal.SIGINT):
                with self.subTest(script=script, signal=number):
                    process = self.start(script, CONFIG, extra="{}")
                    self.assertEqual(self.lines_until(process, "heartbeat #0"), lines)
                    self.assert_stops(process, number)

    def test_heartbeats_follow_the_interval(self):
        for script in ("mp_plugin.py", "mp_heartbeat.sh"):
            with self.subTest(script=script):
                name = script.partition(".")[0]
                process = self.start(script, CONFIG, extra=json.dumps({f"{name}.heartbeat_seconds": 0.1}))
                self.lines_until(process, "heartbeat #2")
                self.assert_stops(process, signal.SIGTERM)

    def test_an_unusable_config_is_named_and_never_echoed(self):
        for script in ("mp_plugin.py", "mp_heartbeat.sh"):
            for config in ("", "not-json", "[1]"):
                with self.subTest(script=script, config=config):
                    process = self.start(script, config)
                    lines = self.lines_until(process, "heartbeat #0")
                    self.assertIn("WARNING: LMCACHE_RUNTIME_PLUGIN_CONFIG", lines[1])
                    self.assertNotIn("not-json", "\n".join(lines))

    def test_the_heartbeat_reads_json_without_jq_and_beats_without_any_reader(self):
        seen = {}
        for tools in (("jq",), ("python3",), ()):
            with tempfile.TemporaryDirectory() as folder:
                for tool in ("sleep", *tools):
                    found = sys.executable if tool == "python3" else shutil.which(tool)
                    if found is None:
                        break
                    # Not a link: an interpreter finds its library from where it lies.
                    launcher = Path(folder, tool)
                    launcher.write_text(f'#!{shutil.which("bash")}\nexec "{found}" "$@"\n')
                    launcher.chmod(0o755)
                else:
                    extra = '{"mp_heartbeat.heartbeat_seconds": "0.1"}'
                    process = self.start("mp_heartbeat.sh", CONFIG, extra=extra, path=folder)
                    seen[tools] = self.lines_until(process, "heartbeat #0")
                    self.assert_stops(process, signal.SIGTERM)
        self.assertEqual(
            seen[("python3",)][1:3],
            [
                "[mp_heartbeat] MP server: host=127.0.0.1 port=5555 chunk_size=256 eviction=LRU",
                "[mp_heartbeat] WARNING: mp_heartbeat.heartbeat_seconds is not a number from 0.1 to 86400: using 30",
            ],
        )
        self.assertEqual(seen.get(("jq",), seen[("python3",)]), seen[("python3",)])
        self.assertIn("neither jq nor python3", seen[()][1])

    def test_a_script_ends_when_nobody_reads_its_lines(self):
        for script in ("mp_plugin.py", "mp_heartbeat.sh"):
            with self.subTest(script=script):
                name = script.partition(".")[0]
                process = self.start(script, CONFIG, extra=json.dumps({f"{name}.heartbeat_seconds": 0.1}))
                self.lines_until(process, "heartbeat #0")
                process.stdout.close()
                process.wait(PATIENCE_SECONDS)


if __name__ == "__main__":
    unittest.main()
