#!/usr/bin/env python3
"""Runs real plugins for LMCache under a Stockade server, as they are: those of LMCache's source
distribution and the heartbeat of `lmcache_frontend`, both from PyPI, in a throw-away environment.

    tests/lmcache/plugins.py [--server FILE] [--lmcache SITE_PACKAGES]

Needs a package index. Plugins that import `lmcache` itself, and with it torch, run only where
--lmcache names a directory that has both installed.
"""

import argparse
import http.server
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import urllib.parse
import urllib.request
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VERSION = "0.5.6"
PATIENCE_SECONDS = 120

# Ours, in the style of lmcache_frontend's own: its service, pointed at the address that the
# operator configured.
HEARTBEAT = """\
#!/opt/venv/bin/python
import json, os, signal, sys, threading
from lmcache_frontend.heartbeat import HeartbeatService
extra = json.loads(os.environ["LMCACHE_RUNTIME_PLUGIN_EXTRA_CONFIG"])
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
HeartbeatService().start(extra["plugin.frontend.heartbeat-url"], interval=1)
threading.Event().wait()
"""


class Sink(http.server.BaseHTTPRequestHandler):
    """Takes heartbeats."""

    beats = []

    def do_GET(self):
        self.beats.append(dict(urllib.parse.parse_qsl(urllib.parse.urlparse(self.path).query)))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


def source_distribution(directory):
    """Fetches LMCache's sources without building them; the directory of its examples."""
    found = subprocess.run(
        [sys.executable, "-m", "pip", "config", "get", "global.index-url"],
        capture_output=True,
        text=True,
    ).stdout.strip()
    index = os.environ.get("PIP_INDEX_URL") or found or "https://pypi.org/simple"
    page_url = f"{index.rstrip('/')}/lmcache/"
    page = urllib.request.urlopen(page_url).read().decode()
    link = re.search(rf'href="([^"]*lmcache-{re.escape(VERSION)}\.tar\.gz[^"]*)"', page)[1]
    url = urllib.parse.urljoin(page_url, link)
    archive = directory / "lmcache.tar.gz"
    with urllib.request.urlopen(url) as response, open(archive, "wb") as file:
        shutil.copyfileobj(response, file)
    with tarfile.open(archive) as tar:
        members = [m for m in tar if "/examples/" in m.name and "runtime_plugins" in m.name]
        tar.extractall(directory, members=members, filter="data")
    return directory / f"lmcache-{VERSION}" / "examples"


def environment(directory, lmcache):
    """A virtual environment with lmcache_frontend; its `bin`."""
    venv.create(directory / "venv", with_pip=True)
    binaries = directory / "venv/bin"
    command = [binaries / "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*command, "lmcache_frontend"], check=True)
    if lmcache:
        packages = next((directory / "venv/lib").glob("python3*/site-packages"))
        (packages / "lmcache.pth").write_text(f"{Path(lmcache).resolve()}\n")
    return binaries


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    parser.add_argument("--server", default=target / "debug/stockade", type=Path)
    parser.add_argument("--lmcache", help="site-packages with lmcache and torch")
    arguments = parser.parse_args()

    directory = Path(tempfile.mkdtemp(prefix="stockade-lmcache-", dir=os.environ.get("TMPDIR")))
    sink = http.server.HTTPServer(("127.0.0.1", 0), Sink)
    threading.Thread(target=sink.serve_forever, daemon=True).start()
    try:
        examples = source_distribution(directory)
        binaries = environment(directory, arguments.lmcache)
        run(arguments, directory, examples, binaries, sink.server_port)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def run(arguments, directory, examples, binaries, sink_port):
    packages = next((directory / "venv/lib").glob("python3*/site-packages"))
    plugins = directory / "plugins"
    shutil.copytree(examples / "mp_runtime_plugins", plugins / "mp")
    shutil.copytree(examples / "runtime_plugins", plugins / "engine")
    frontend = packages / "lmcache_frontend/lmcache_plugin/scheduler_lmc_frontend_plugin.py"
    shutil.copy(frontend, plugins / "engine")
    (plugins / "heartbeat.py").write_text(HEARTBEAT)
    # Of each plugin, what its log shows when it works.
    expected = {
        "mp_plugin": r"\[mp_plugin\] heartbeat #0",
        "mp_heartbeat": r"\[mp_heartbeat\] heartbeat #0",
        "all_plugin": r"All plugin is running for .*loop_count: 0",
        "heartbeat": r"Heartbeat sent successfully: .* - Status: 200",
    }
    for path in (plugins / "engine").glob("worker*.sh"):
        expected[path.stem] = r"Worker plugin is running for worker 0"
    imports_lmcache = {
        "scheduler_foo_plugin": r"Scheduler plugin is running... \(loop_count: 0\)",
        "scheduler_lmc_frontend_plugin": r"Python plugin running with role",
    }
    if arguments.lmcache:
        expected |= imports_lmcache
        # What they import lies outside their environment, so they are granted it; torch maps
        # far more memory than it uses.
        packages = Path(arguments.lmcache).resolve()
        grants = f'[directories."/lmcache"]\nhost = "{packages}"\n[process]\nmemory_mib = 65536\n'
        for name in imports_lmcache:
            (plugins / "engine" / f"{name}.plugin.toml").write_text(grants)
    else:
        for name in imports_lmcache:
            print(f"skipped: {name}, which imports lmcache and torch")
            (plugins / "engine" / f"{name}.py").unlink()
    extra = {"plugin.frontend.heartbeat-url": f"http://127.0.0.1:{sink_port}/beat"}
    log = directory / "log"
    with open(log, "w") as output:
        process = subprocess.Popen(
            [arguments.server, "serve", "--port", "0", "--http-port", "0", "--l1-size-gb", "0.0625"]
            + ["--plugin-cache-dir", directory / "cache"]
            + ["--runtime-plugin-config", json.dumps(extra)]
            + ["--runtime-plugin-locations", plugins],
            env=os.environ | {"PATH": f"{binaries}:{os.environ['PATH']}"},
            stderr=output,
        )
    try:
        missing = dict(expected)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while missing and time.monotonic() < deadline and process.poll() is None:
            text = log.read_text()
            for name, pattern in list(missing.items()):
                if re.search(rf"\[{name}\] .*{pattern}|{pattern}", text):
                    del missing[name]
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)
        text = log.read_text()
        for line in text.splitlines():
            if "held to" in line or "exited" in line or "was ended" in line:
                print(line)
        if missing or process.returncode:
            sys.exit(f"{text}\nnot seen: {sorted(missing)}, exit code {process.returncode}")
        beat = Sink.beats[0]
        print(f"{len(expected)} plugins ran; {len(Sink.beats)} heartbeats, the first {beat}")
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    main()
