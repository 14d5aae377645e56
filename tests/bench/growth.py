#!/usr/bin/env python3
"""How cost grows with keys, clients, tokens and plugins: one server for each size, medians of `stockade bench`.

    python3 tests/bench/growth.py [--server PROGRAM] [--short] [--output DIRECTORY] [keys clients tokens plugins]

Writes growth.csv and an SVG for each kind of growth into DIRECTORY and prints the rows. The long form has
10^3 to 10^7 keys (11 GiB of /dev/shm), 1 to 1000 clients, 1k to 1M tokens and 0 to 10 000 plugins, and takes
about a quarter of an hour on two idle cores.
"""

import argparse
import csv
import pathlib
import shutil
import tempfile
import time

import chart
from server import ROOT, Server

SIZES = {
    "keys": [10**3, 10**4, 10**5, 10**6, 10**7],
    "clients": [1, 4, 16, 64, 256, 1000],
    "tokens": [1 << power for power in range(10, 21, 2)],
    "plugins": [0, 10, 100, 1000, 10_000],
}
SHORT = {"keys": [10**3, 10**4], "clients": [1, 16], "tokens": [1024, 4096], "plugins": [0, 10]}
GIB = 1 << 30


def keys(program, size, seconds):
    """Objects of 1 KiB; lookups and stores of 64 chunks beside them."""
    flags = ["--chunk-size", 16, "--l1-align-bytes", 1024, "--eviction-trigger-watermark", 1, "--l1-use-lazy"]
    pool = size * 1024 * 1.1 + 64 * 2**20
    with Server(program, "--l1-size-gb", pool / GIB, *flags) as server:
        while (missing := size - server.l1()["total_object_count"]) > 0:
            tokens = min(missing, 4096) * 16
            server.bench("--workload", "store", "--tokens", tokens, "--chunk-kib", 1, "--turns", 1, "--seconds", max(0.01, min(2, missing / 10**6)))
        flags = ["--tokens", 1024, "--chunk-kib", 1, "--turns", 2, "--seconds", seconds / 2]
        rows = server.bench("--workload", "noop,lookup-miss,lookup-hit", *flags)
        also = {"rss_kib": server.sample()["rss_kib"], "objects": server.l1()["total_object_count"]}
        # Last, because it adds to the keys.
        return rows + server.bench("--workload", "store", *flags), also


def clients(program, size, seconds):
    with Server(program, "--l1-size-gb", 2) as server:
        workloads = "noop,lookup-miss,lookup-hit,store,retrieve"
        rows = server.bench("--workload", workloads, "--clients", size, "--tokens", 1024, "--chunk-kib", 16, "--turns", 2, "--seconds", seconds / 2)
        return rows, {"rss_kib": server.sample()["rss_kib"]}


def tokens(program, size, seconds):
    with Server(program, "--l1-size-gb", 2) as server:
        workloads = "lookup-miss,lookup-hit,store,retrieve"
        rows = server.bench("--workload", workloads, "--tokens", size, "--chunk-kib", 16, "--turns", 2, "--seconds", seconds / 2)
        return rows, {"rss_kib": server.sample()["rss_kib"]}


def plugins(program, size, seconds):
    """Sleeping guests, which are what most plugins are most of the time."""
    with tempfile.TemporaryDirectory() as directory:
        for number in range(size):
            shutil.copy(ROOT / "tests/guests/sleeper.wat", pathlib.Path(directory, f"sleeper-{number}.wat"))
        begun = time.monotonic()
        with Server(program, "--l1-size-gb", 1, "--runtime-plugin-locations", directory) as server:
            while True:
                states = [plugin["state"] for plugin in server.http("/v1/plugins")["plugins"]]
                if len(states) == size and all(state == "running" for state in states):
                    break
                if time.monotonic() - begun > 600:
                    raise SystemExit(f"after 600 s {states.count('running')} of {size} plugins run")
                time.sleep(0.2)
            started = time.monotonic() - begun
            rows = server.bench("--workload", "noop,lookup-miss,lookup-hit", "--tokens", 1024, "--turns", 2, "--seconds", seconds / 2)
            sample = server.sample()
            return rows, {"rss_kib": sample["rss_kib"], "threads": sample["threads"], "all_running_s": round(started, 2)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--server", default=ROOT / "target/release/stockade", type=pathlib.Path)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--output", default=ROOT / "docs/benchmarks", type=pathlib.Path)
    parser.add_argument("kinds", nargs="*", default=list(SIZES))
    settings = parser.parse_args()
    unknown = set(settings.kinds) - set(SIZES)
    if unknown:
        parser.error(f"{', '.join(unknown)}: give {', '.join(SIZES)}")
    settings.output.mkdir(parents=True, exist_ok=True)
    measure = {"keys": keys, "clients": clients, "tokens": tokens, "plugins": plugins}
    with (settings.output / "growth.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["kind", "size", "workload", "p50_us", "p99_us", "rounds_per_second", "also"])
        for kind in settings.kinds:
            lines = {}
            for size in (SHORT if settings.short else SIZES)[kind]:
                rows, also = measure[kind](settings.server, size, 0.2 if settings.short else 4)
                also = " ".join(f"{name}={value}" for name, value in also.items())
                for row in rows:
                    name = row["workload"]
                    cells = [kind, size, name, f"{row['p50_us']:.1f}", f"{row['p99_us']:.1f}", f"{row['rounds_per_second']:.0f}"]
                    writer.writerow([*cells, also])
                    file.flush()
                    print(f"{kind:>8} {size:>9} {name:<12} p50 {cells[3]:>9} us  p99 {cells[4]:>9} us  {cells[5]:>8}/s  {also}", flush=True)
                    # On a logarithmic axis no plugins stand where one would.
                    lines.setdefault(name, []).append((max(size, 1), row["p50_us"]))
            picture = chart.svg(f"Median of a round over {kind}", kind, "microseconds", lines, logarithmic=True)
            (settings.output / f"growth-{kind}.svg").write_text(picture)


if __name__ == "__main__":
    main()
