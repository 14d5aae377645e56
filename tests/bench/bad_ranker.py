#!/usr/bin/env python3
"""What a bad ranking plugin costs stores: p50 and p99 of prepare and commit while eviction at the
watermark asks a plugin that loops, traps or replies garbage, against the native order, on one server whose
plugin is stopped and started in turns.

    python3 tests/bench/bad_ranker.py [--server PROGRAM] [--rounds 10] [--seconds 3] [--guest rank_loops]

The server is started here, with a pool of 64 MiB of which half goes when a tenth is in use.
"""

import argparse
import os
import pathlib
import shutil
import subprocess
import tempfile
import time

import zmq

from spinning_plugins import ROOT, Client, free_port, http, key, percentile, steer

CHUNK = 16


def window(client, seconds, times, state):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        state["number"] += 1
        number = state["number"]
        request = f"s{number}"
        tokens = [number * 8 * CHUNK + place for place in range(8 * CHUNK)]
        store = {**key(tokens, request), "worker_id": 0}
        begun = time.perf_counter()
        client.call("prepare_store", store, 1)
        client.call("commit_store", store, 1, b"")
        times.append(time.perf_counter() - begun)
        client.call("end_session", request)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--server", default=str(ROOT / "target/release/stockade"))
    parser.add_argument("--guest", default="rank_loops", help="a ranker of tests/guests/abi-v1")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=3.0)
    settings = parser.parse_args()
    guest = settings.guest
    with tempfile.TemporaryDirectory() as directory:
        plugins = pathlib.Path(directory, "plugins")
        plugins.mkdir()
        shutil.copy(ROOT / f"tests/guests/abi-v1/{guest}.wat", plugins / f"{guest}.wat")
        manifest = "stop_grace_seconds = 0\nrank = true\n[limits]\ncpu_percent = 100\ncall_ms = 600000\n"
        (plugins / f"{guest}.plugin.toml").write_text(manifest)
        port, http_port = free_port(), free_port()
        command = [
            settings.server, "serve", "--host", "127.0.0.1", "--port", str(port), "--http-port",
            str(http_port), "--l1-size-gb", "0.0625", "--chunk-size", str(CHUNK),
            "--eviction-trigger-watermark", "0.1", "--eviction-ratio", "0.5",
            "--plugin-cache-dir", f"{directory}/cache", "--runtime-plugin-locations", str(plugins),
            "--log-level", "error",
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
            client.call("register_kv_cache_engine_driven_context", {
                "instance_id": 1, "model_name": "m", "world_size": 1, "block_size": 16, "num_layers": 2,
                "hidden_dim_size": 16, "dtype_str": "float16", "use_mla": False, "num_physical_slots": None,
            })
            times = {"native": [], "plugin": []}
            state = {"number": 0}
            window(client, 1, [], state)
            for _ in range(settings.rounds):
                steer(base, [guest], "stop", "stopped")
                window(client, settings.seconds, times["native"], state)
                steer(base, [guest], "start", "running")
                window(client, settings.seconds, times["plugin"], state)
            for share in (0.5, 0.99):
                native, plugin = (percentile(times[kind], share) for kind in ("native", "plugin"))
                print(
                    f"store p{share * 100:.0f}: {native:.3f} ms native, {plugin:.3f} ms with {guest}, ratio "
                    f"{plugin / native:.3f} ({len(times['native'])} and {len(times['plugin'])} stores)"
                )
            status = http("GET", f"{base}/v1/plugins/{guest}")
            print(f"orders used {status['ranked']}, fallbacks {status['rank_fallbacks']}")
        finally:
            server.terminate()
            server.wait(timeout=30)


if __name__ == "__main__":
    main()
