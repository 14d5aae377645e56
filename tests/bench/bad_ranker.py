#!/usr/bin/env python3
"""What a bad ranking plugin costs stores: p50 and p99 of prepare and commit on a server whose plugin loops,
traps or replies garbage whenever eviction at the watermark asks it, against a server without a plugin.

    python3 tests/bench/bad_ranker.py [--server PROGRAM] [--rounds 10] [--seconds 3] [--guest rank_loops]...

Both servers have a pool of 64 MiB of which half of what is used goes when a tenth is. They take turns of
half a second, and the one whose turn it is not is stopped with SIGSTOP, so that a plugin that spins takes
nothing from the server without one. The plugin has all the processor that it can get at a guest's priority.

It needs pyzmq and msgspec. --assert ends with 1 where p99 is more than 5 % above that without a plugin.
"""

import argparse
import pathlib
import re
import shutil
import signal
import sys
import tempfile
import time

import zmq

from server import ROOT, Server
from spinning_plugins import Client, key, percentile

CHUNK = 16
BUDGET = 1.05
TURN_SECONDS = 0.5
GUESTS = ["rank_loops", "rank_garbage", "rank_foreign", "rank_traps"]
MANIFEST = "stop_grace_seconds = 0\nrank = true\n[limits]\ncpu_percent = 100\ncall_ms = 600000\n"
FLAGS = [
    "--l1-size-gb", "0.0625", "--chunk-size", CHUNK, "--eviction-trigger-watermark", "0.1",
    "--eviction-ratio", "0.5",
]


class Side:
    """A server and the one client that stores there."""

    def __init__(self, server):
        self.server = server
        self.client = Client(zmq.Context.instance(), server.url)
        self.client.call("register_kv_cache_engine_driven_context", {
            "instance_id": 1, "model_name": "m", "world_size": 1, "block_size": 16, "num_layers": 2,
            "hidden_dim_size": 16, "dtype_str": "float16", "use_mla": False, "num_physical_slots": None,
        })
        self.number = 0
        self.times = []

    def turn(self, seconds, is_measured=True):
        self.server.process.send_signal(signal.SIGCONT)
        # What stopping left undone is not what is measured.
        self.client.call("noop")
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.number += 1
            request = f"s{self.number}"
            tokens = [self.number * 8 * CHUNK + place for place in range(8 * CHUNK)]
            store = key(tokens, request, 0)
            begun = time.perf_counter()
            self.client.call("prepare_store", store, 1)
            self.client.call("commit_store", store, 1, b"")
            if is_measured:
                self.times.append(time.perf_counter() - begun)
            self.client.call("end_session", request)
        self.server.process.send_signal(signal.SIGSTOP)

    def metrics(self):
        self.server.process.send_signal(signal.SIGCONT)
        text = self.server.text("/metrics")
        found = re.findall(r"^(stockade_plugin_rankings_total|\w*evicted\w*_total)(\{.*\})? (\S+)$", text, re.M)
        return {name + labels: float(value) for name, labels, value in found}


def measure(program, guest, rounds, seconds):
    with tempfile.TemporaryDirectory() as plugins:
        shutil.copy(ROOT / f"tests/guests/abi-v1/{guest}.wat", plugins)
        pathlib.Path(plugins, f"{guest}.plugin.toml").write_text(MANIFEST)
        with Server(program, *FLAGS) as bare, Server(program, *FLAGS, "--runtime-plugin-locations", plugins) as ranked:
            try:
                return compare(guest, Side(bare), Side(ranked), rounds, seconds)
            finally:
                for server in (bare, ranked):
                    server.process.send_signal(signal.SIGCONT)


def compare(guest, without, beside, rounds, seconds):
    deadline = time.monotonic() + 60
    while beside.server.http(f"/v1/plugins/{guest}")["state"] != "running":
        if time.monotonic() > deadline:
            raise SystemExit(f"{guest} does not run")
        time.sleep(0.05)
    for side in (without, beside):
        side.turn(min(seconds, 1.0), is_measured=False)
    turns = max(1, round(rounds * seconds / TURN_SECONDS))
    for turn in range(turns):
        # Whoever comes second has no lasting advantage.
        for side in (without, beside) if turn % 2 else (beside, without):
            side.turn(TURN_SECONDS)
    worst = 0.0
    for share in (0.5, 0.99):
        base, with_plugin = percentile(without.times, share), percentile(beside.times, share)
        worst = with_plugin / base
        print(
            f"{guest:>14} store p{share * 100:.0f}: {base:.3f} ms without a plugin, {with_plugin:.3f} ms beside it, "
            f"ratio {worst:.3f} ({len(without.times)} and {len(beside.times)} stores)"
        )
    counts = beside.metrics()
    rankings = {}
    for name, value in counts.items():
        found = re.match(r'stockade_plugin_rankings_total\{.*reason="(\w+)"', name)
        if found and value:
            rankings[found.group(1)] = int(value)
    used = int(counts.get("stockade_ranked_evicted_objects_total", 0))
    evicted = int(counts.get("lmcache_mp_l1_evicted_chunks_total", 0))
    told = ", ".join(f"{reason} {count}" for reason, count in sorted(rankings.items())) or "none"
    print(f"{guest:>14} rankings by outcome: {told}; {evicted} objects evicted, {used} of them in its order")
    if used:
        raise SystemExit(f"{guest} is no bad ranker: its order was used")
    if not any(reason not in ("ok", "paused") for reason in rankings):
        raise SystemExit(f"{guest} was never asked: nothing is shown")
    return worst


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--server", default=str(ROOT / "target/release/stockade"))
    parser.add_argument("--guest", action="append", help=f"a ranker of tests/guests/abi-v1 [default: {' '.join(GUESTS)}]")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=3.0, help="of storing in each round and server")
    parser.add_argument("--assert", dest="is_checked", action="store_true")
    settings = parser.parse_args()
    ratios = {guest: measure(settings.server, guest, settings.rounds, settings.seconds) for guest in settings.guest or GUESTS}
    over = {guest: round(ratio, 3) for guest, ratio in ratios.items() if ratio > BUDGET}
    print(f"p99 ratio, budget {BUDGET}: " + (f"over it {over}" if over else "held by all"))
    return 1 if over and settings.is_checked else 0


if __name__ == "__main__":
    sys.exit(main())
