#!/usr/bin/env python3
"""A long mixed load: chats, stores, retrieves and lookups of two tenants in a pool that is too small for them, over a
second tier that is too small as well, while plugins are reloaded. What the server holds must not grow, and its
latency must not either.

    python3 tests/bench/soak.py [--server PROGRAM] [--minutes 60] [--output DIRECTORY]

Each minute it samples memory, descriptors, threads and the latencies of one probe workload, into soak.csv
and soak-*.svg. It fails when at the end

- memory rose over the second half by more than its noise, and by more than 1 MiB an hour;
- there are more descriptors or threads than after the warm-up, a few aside;
- the p99 of the probes of the last sixth is more than a tenth above the first sixth's, runs of ten minutes or
  more only: in a shorter one a sixth is a single probe;
- any round failed, a plugin is not running, nothing was evicted from memory, or written to the second tier or read
  from it, or anything is still held when the load is over.
"""

import argparse
import csv
import json
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time

import chart
from server import ROOT, Server

CONFIG = """
[tenants.red]
salts = ["red"]
floor_gb = 0.05
weight = 2
[tenants.rest]
weight = 1
"""
LOADS = [
    ("chat", ["--workload", "chat", "--tokens", "8192", "--clients", "2", "--cache-salt", "red"]),
    # So many that memory has lost a conversation when its next turn comes, and the second tier has it.
    ("chats", ["--workload", "chat", "--tokens", "8192", "--clients", "24"]),
    ("store", ["--workload", "store", "--tokens", "4096", "--clients", "1"]),
    ("hit", ["--workload", "lookup-hit,retrieve", "--tokens", "2048", "--clients", "2", "--cache-salt", "red"]),
]
PROBE = ["--workload", "noop,lookup-miss", "--tokens", "2048", "--clients", "1", "--turns", "2"]


class Load(threading.Thread):
    """Repeats one `stockade bench` until told to stop; each one connects, registers and leaves anew."""

    def __init__(self, server, name, flags, seconds):
        super().__init__(name=name, daemon=True)
        self.command = [server.program, "bench", "--json", "--url", server.url, "--chunk-kib", "64", "--turns", "1"]
        self.command += ["--seconds", str(seconds), *flags]
        self.over, self.rounds, self.problems = threading.Event(), 0, []

    def run(self):
        while not self.over.is_set():
            done = subprocess.run(self.command, capture_output=True, text=True)
            if done.returncode != 0:
                # A prompt that finds no room because its tenant's objects are all locked is an answer, wrong bytes are not.
                self.problems.append(done.stderr.strip().splitlines()[-1])
                time.sleep(0.1)
                continue
            self.rounds += sum(row["rounds"] for row in json.loads(done.stdout))


def reload_plugins(directory, over, seconds):
    """Writes the plugins anew, so that the server, which watches them, starts new versions beside the old ones."""
    number = 0
    while not over.wait(seconds):
        number += 1
        script = directory / "looper.sh"
        fresh = script.with_suffix(".new")
        fresh.write_text(f"# version {number}\nwhile :; do sleep 1; echo tick; done\n")
        fresh.rename(script)
        guest = directory / "ticker.wat"
        text = (ROOT / "tests/guests/sleep_loop.wat").read_text()
        fresh = guest.with_suffix(".new")
        fresh.write_text(f";; version {number}\n{text}")
        fresh.rename(guest)


def slope_per_hour(points):
    """Least squares: the rise an hour, and the spread of what it leaves unexplained."""
    if len(points) < 3:
        return 0.0, 0.0
    line = statistics.linear_regression(*zip(*points))
    noise = statistics.pstdev(y - line.slope * x - line.intercept for x, y in points)
    return line.slope * 60, noise


def judge(samples, minutes, least_slack_kib=1024):
    """The sentences that say what is wrong."""
    problems = []
    half = [sample for sample in samples if sample["minute"] >= samples[-1]["minute"] / 2]
    rise, noise = slope_per_hour([(sample["minute"], sample["rss_kib"]) for sample in half])
    risen = rise / 60 * (half[-1]["minute"] - half[0]["minute"])
    if minutes >= 10 and rise > least_slack_kib and risen > 2 * noise:
        problems.append(f"memory rises by {rise:.0f} KiB an hour, with a noise of {noise:.0f} KiB")
    warm = samples[min(1, len(samples) - 1)]
    for what in ("descriptors", "threads"):
        if samples[-1][what] > warm[what] + 8:
            problems.append(f"{what}: {samples[-1][what]}, {warm[what]} after the warm-up")
    if minutes >= 10:
        sixth = max(1, len(samples) // 6)
        for what in ("noop_p99_us", "lookup-miss_p99_us"):
            first, last = (statistics.median(sample[what] for sample in part) for part in (samples[:sixth], samples[-sixth:]))
            if last > first * 1.1:
                problems.append(f"{what}: {last:.0f} in the last sixth, {first:.0f} in the first")
    return problems


def second_tier(server):
    """Objects written to it and read from it so far, in one directory or another."""
    return {
        "l2_written": server.metric("lmcache_mp_l2_store_completed_requests_total"),
        "l2_read": server.metric("lmcache_mp_l2_load_completed_requests_total"),
    }


def settled(server):
    """What is still held, once it should be nothing."""
    deadline = time.monotonic() + 30
    while True:
        status = server.http("/status")
        l1 = status["storage_manager"]["l1_manager"]
        held = {
            "locks": l1["object_locks"],
            "locks without an owner": l1["object_locks"] - l1["owned_locks"],
            "staging bytes": l1["staging_bytes"],
            "workers": status["worker_liveness"]["tracked_instances"],
            "bytes of no salt": l1["memory_used_bytes"] - sum(l1["bytes_by_cache_salt"].values()),
        }
        held = {name: value for name, value in held.items() if value != 0}
        if not held or time.monotonic() > deadline:
            return held
        time.sleep(0.2)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", default=ROOT / "target/release/stockade", type=pathlib.Path)
    parser.add_argument("--minutes", default=60.0, type=float)
    parser.add_argument("--output", default=ROOT / "docs/benchmarks", type=pathlib.Path)
    parser.add_argument("--flag", action="append", default=[], help="a further flag of the server, such as --flag=--eviction-policy=ARC")
    settings = parser.parse_args()
    # Ten samples at least, also of a run that only shows that this script works.
    interval = min(60.0, settings.minutes * 6)
    settings.output.mkdir(parents=True, exist_ok=True)
    problems, samples = [], []
    with tempfile.TemporaryDirectory() as directory:
        plugins = pathlib.Path(directory, "plugins")
        plugins.mkdir()
        shutil.copy(ROOT / "tests/guests/sleep_loop.wat", plugins / "ticker.wat")
        (plugins / "looper.sh").write_text("while :; do sleep 1; echo tick; done\n")
        config = pathlib.Path(directory, "stockade.toml")
        config.write_text(CONFIG)
        storage = {"type": "fs", "base_path": f"{directory}/l2", "max_capacity_gb": 1}
        flags = ["--config", config, "--l1-size-gb", 0.25, "--runtime-plugin-locations", plugins, "--plugin-watch"]
        flags += ["--l2-adapter", json.dumps(storage), *settings.flag]
        with Server(settings.server, *flags) as server:
            loads = [Load(server, name, flags, min(10, interval / 2)) for name, flags in LOADS]
            reloaded = threading.Event()
            reloader = threading.Thread(target=reload_plugins, args=(plugins, reloaded, interval / 4), daemon=True)
            for thread in (*loads, reloader):
                thread.start()
            begun = time.monotonic()
            for tick in range(1, round(settings.minutes * 60 / interval) + 1):
                time.sleep(max(0.0, begun + tick * interval - time.monotonic()))
                # A fifth of the time, so that a p99 stands on enough rounds.
                rows = server.bench(*PROBE, "--seconds", interval / 20)
                sample = {"minute": round((time.monotonic() - begun) / 60, 3), **server.sample()}
                # Without those of the load, which comes and goes.
                sample["descriptors"] -= int(server.metric("stockade_connections_open"))
                for row in rows:
                    sample |= {f"{row['workload']}_p50_us": row["p50_us"], f"{row['workload']}_p99_us": row["p99_us"]}
                    problems += [row["first_error"]] if row["errors"] else []
                l1 = server.l1()
                sample |= {"objects": l1["total_object_count"], "evicted": l1["evicted_objects"], "rounds": sum(load.rounds for load in loads)}
                sample |= second_tier(server)
                samples.append(sample)
                print(" ".join(f"{name}={value:g}" for name, value in sample.items()), flush=True)
            for load in loads:
                load.over.set()
            reloaded.set()
            for thread in (*loads, reloader):
                thread.join(timeout=120)
            for load in loads:
                problems += [f"{load.name}: {len(load.problems)} runs failed, the first: {load.problems[0]}"] if load.problems else []
                problems += [] if load.rounds else [f"{load.name}: not one round"]
            held = settled(server)
            problems += [f"still held: {held}"] if held else []
            for plugin in server.http("/v1/plugins")["plugins"]:
                problems += [] if plugin["state"] == "running" else [f"plugin {plugin['name']} is {plugin['state']}"]
            problems += [] if samples[-1]["evicted"] > 0 else ["nothing was evicted: the load is too small for the pool"]
            for name in ("l2_written", "l2_read"):
                problems += [] if samples[-1][name] > 0 else [f"{name} is 0: the second tier was not in use"]
    with (settings.output / "soak.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, samples[0])
        writer.writeheader()
        writer.writerows(samples)
    column = lambda name: [(sample["minute"], sample[name]) for sample in samples]
    for name, title, unit, columns in (
        ("memory", "Memory without the pool", "KiB", ["rss_kib"]),
        ("handles", "Descriptors and threads", "number", ["descriptors", "threads"]),
        ("latency", "p99 of a probe beside the load", "microseconds", ["noop_p99_us", "lookup-miss_p99_us"]),
    ):
        picture = chart.svg(title, "minutes", unit, {it: column(it) for it in columns})
        (settings.output / f"soak-{name}.svg").write_text(picture)
    problems += judge(samples, settings.minutes)
    for problem in problems:
        print(f"FAILED: {problem}")
    if problems:
        sys.exit(1)
    print(f"{settings.minutes:g} minutes, {samples[-1]['rounds']} rounds, {samples[-1]['evicted']} objects evicted: nothing grew")


if __name__ == "__main__":
    main()
