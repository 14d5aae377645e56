#!/usr/bin/env python3
"""What spinning plugins cost the data path: latency of pings and lookups with fifty guests in endless
loops against none, on one server, in windows that take turns.

    python3 tests/bench/spinning_plugins.py [--server PROGRAM] [--plugins 50] [--rounds 10] [--seconds 3]

The server is started here, with a pool of 64 MiB; everything goes over 127.0.0.1.
"""

import argparse
import json
import os
import pathlib
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.request

import msgspec
import zmq

ROOT = pathlib.Path(__file__).resolve().parents[2]
GUEST = ROOT / "tests/guests/endless_loop.wat"


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def http(method, url):
    request = urllib.request.Request(url, method=method)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.loads(answer.read())


def steer(base, names, action, state):
    for name in names:
        http("POST", f"{base}/v1/plugins/{name}/{action}")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        plugins = http("GET", f"{base}/v1/plugins")["plugins"]
        if all(plugin["state"] == state for plugin in plugins):
            return plugins
        time.sleep(0.05)
    raise SystemExit(f"the plugins did not become {state}")


class Client:
    def __init__(self, context, url):
        self.socket = context.socket(zmq.DEALER)
        self.socket.connect(url)
        self.uid = 0

    def call(self, operation, *arguments):
        self.uid += 1
        frames = [msgspec.msgpack.encode(part) for part in (self.uid, operation, *arguments)]
        self.socket.send_multipart(frames)
        if not self.socket.poll(10_000):
            raise SystemExit(f"no answer to {operation}")
        return self.socket.recv_multipart()


def key(tokens, request):
    return {
        "model_name": "m", "world_size": 1, "worker_id": None, "token_ids": tokens, "start": 0,
        "end": len(tokens), "request_id": request, "cache_salt": "", "request_configs": None,
        "num_kv_readers": 1,
    }


def window(client, seconds, tokens, times):
    end = time.monotonic() + seconds
    number = 0
    while time.monotonic() < end:
        number += 1
        begun = time.perf_counter()
        client.call("noop")
        pinged = time.perf_counter()
        request = f"r{number}"
        client.call("lookup", key(tokens, request), 1)
        client.call("query_prefetch_status", request)
        times["ping"].append(pinged - begun)
        times["lookup"].append(time.perf_counter() - pinged)


def percentile(values, share):
    values = sorted(values)
    return values[min(len(values) - 1, int(len(values) * share))] * 1e3


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--server", default=str(ROOT / "target/release/stockade"))
    parser.add_argument("--plugins", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=3.0)
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        plugins = pathlib.Path(directory, "plugins")
        plugins.mkdir()
        names = [f"spin-{number}" for number in range(settings.plugins)]
        for name in names:
            shutil.copy(GUEST, plugins / f"{name}.wat")
            manifest = "stop_grace_seconds = 0\n[limits]\ncpu_percent = 100\n"
            (plugins / f"{name}.plugin.toml").write_text(manifest)
        port, http_port = free_port(), free_port()
        command = [
            settings.server, "serve", "--host", "127.0.0.1", "--port", str(port), "--http-port",
            str(http_port), "--l1-size-gb", "0.0625", "--plugin-cache-dir", f"{directory}/cache",
            "--runtime-plugin-locations", str(plugins), "--log-level", "error",
        ]
        server = subprocess.Popen(command, env={**os.environ}, stderr=subprocess.DEVNULL)
        base = f"http://127.0.0.1:{http_port}"
        try:
            deadline = time.monotonic() + 60
            while True:
                try:
                    http("GET", f"{base}/healthcheck")
                    break
                except OSError:
                    if time.monotonic() > deadline or server.poll() is not None:
                        raise SystemExit("the server did not start")
                    time.sleep(0.05)
            client = Client(zmq.Context.instance(), f"tcp://127.0.0.1:{port}")
            tokens = list(range(1024))
            times = {kind: {"ping": [], "lookup": []} for kind in ("none", "spinning")}
            steer(base, [], "stop", "running")
            window(client, 1, tokens, {"ping": [], "lookup": []})
            for _ in range(settings.rounds):
                steer(base, names, "stop", "stopped")
                window(client, settings.seconds, tokens, times["none"])
                steer(base, names, "start", "running")
                window(client, settings.seconds, tokens, times["spinning"])
            for operation in ("ping", "lookup"):
                for share in (0.5, 0.99):
                    none, spinning = (percentile(times[kind][operation], share) for kind in ("none", "spinning"))
                    print(
                        f"{operation:>7} p{share * 100:.0f}: {none:.3f} ms without, {spinning:.3f} ms with "
                        f"{settings.plugins} spinning, ratio {spinning / none:.3f} "
                        f"({len(times['none'][operation])} and {len(times['spinning'][operation])} calls)"
                    )
        finally:
            server.terminate()
            server.wait(timeout=30)


if __name__ == "__main__":
    main()
