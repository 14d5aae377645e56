#!/usr/bin/env python3
"""Runs the cache engine's benches and prints the table of docs/benchmarks.md from what they measured.

    tests/bench/cache_table.py               # minutes, on a quiet machine
    tests/bench/cache_table.py --no-run      # from the last run
    tests/bench/cache_table.py --filter copy # only what has this in its name, the rest from the last run
"""

import argparse
import json
import os
import pathlib
import platform
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
TARGET = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
TOKENS = 131_072
GIB = 1 << 30


def nanoseconds(name):
    """Median of a bench in nanoseconds of processor time; None if it was not run."""
    path = TARGET / "criterion" / name / "new" / "estimates.json"
    if not path.exists():
        return None
    return json.loads(path.read_text())["median"]["point_estimate"]


def cell(names, convert, unit):
    """One value per bench, joined as the table has them."""
    values = [nanoseconds(name) for name in names]
    shown = ["not run" if value is None else convert(value) for value in values]
    return f"{' / '.join(shown)} {unit}"


def number(value):
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def microseconds(value):
    return number(value / 1e3)


def per(count):
    return lambda value: number(value / count / 1e3)


def rate(amount, unit):
    return lambda value: number(amount / value * 1e9 / unit)


def table():
    sizes = (4096, 100_000, 1_000_000)
    lookups = [f"lock_prefix_512/1_rows_of_{size}_objects" for size in sizes]
    eight = [f"lock_prefix_512/8_rows_of_{size}_objects" for size in sizes]
    megatokens = rate(TOKENS, 1e6)
    small, large = 256 << 10, 32 << 20

    def copies(what):
        pairs = ((f"copy/{what}_{size}", size) for size in (small, large))
        return " / ".join(cell([name], rate(size, GIB), "").strip() for name, size in pairs)

    evicted = {
        policy: cell(
            [f"evict_half_per_victim/{policy}_of_{count}" for count in (100_000, 1_000_000)],
            lambda value: number(value),
            "ns",
        )
        for policy in ("LRU", "ARC", "IsolatedLRU", "S3FIFO")
    }
    rows = [
        (
            "lookup and lock of 512 chunks, 1 rank, with 4 thousand / 100 thousand / 1 million objects",
            cell(lookups, microseconds, "us"),
        ),
        ("giving those 512 locks back, the same sizes", cell([f"{it}_release" for it in lookups], microseconds, "us")),
        ("lookup and lock of 512 chunks, 8 ranks, the same sizes", cell(eight, microseconds, "us")),
        (
            "lookup of 512 chunks that are not there, the same sizes",
            cell([f"lock_prefix_512/miss_of_{size}_objects" for size in sizes], microseconds, "us"),
        ),
        (
            "token hasher, chunks of 256",
            cell(["hash_128k_tokens/chunk_256"], megatokens, "Mtok/s")
            + ", against "
            + cell(["hash_128k_tokens/bare_blake3_chained_256"], megatokens, "for bare chained blake3"),
        ),
        (
            "reserve and commit with one eviction each: 1 object / each of 512",
            " / ".join(
                cell([f"reserve_and_commit/{count}_with_demand_eviction"], per(count), "").strip() for count in (1, 512)
            )
            + " us",
        ),
        (
            "allocator, allocate and free, with 1 thousand / 100 thousand free ranges",
            cell([f"allocate_and_free/{live}_free_ranges" for live in (1000, 100_000)], microseconds, "us"),
        ),
        (
            "inline copy into the pool with CRC-32C, 256 KiB / 32 MiB",
            f"{copies('write')} GiB/s, out of it {copies('read')}, against {copies('memcpy')} for memcpy",
        ),
        *((f"eviction per victim, {policy}, of 10^5 / 10^6", shown) for policy, shown in evicted.items()),
    ]
    lines = ["| what | result |", "|---|---|"]
    lines += [f"| {what} | {result} |" for what, result in rows]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-run", action="store_true", help="print the last run's table")
    parser.add_argument("--filter", help="run only benches with this in their names")
    arguments = parser.parse_args()
    if not arguments.no_run:
        command = ["cargo", "bench", "-p", "stockade-cache", "--bench", "engine", "--locked"]
        command += ["--", arguments.filter] if arguments.filter else []
        subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
    load = " ".join(f"{value:.2f}" for value in os.getloadavg())
    print(f"<!-- {platform.machine()}, {os.cpu_count()} cores, load {load} at the end -->")
    print(table())


if __name__ == "__main__":
    main()
