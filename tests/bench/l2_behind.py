#!/usr/bin/env python3
"""What storage has of prompts that come faster than it can write them.

    python3 tests/bench/l2_behind.py [--server PROGRAM] [--beside OTHER] [--rounds 3] [--seconds 4] [--chunks 16]
        [--directory DIRECTORY]

Prompts of their own are stored one after the other into a pool of 256 MiB with a directory below it, for
longer than the pool lasts. Then, once nothing waits to be written and memory is cleared, up to 400 of them are
looked up. Prints, for each server in turns: chunks stored a second, which part of them was written, and
which part lookups find; a chunk is found only if all before it are. Needs msgspec.
"""

import argparse
import json
import os
import pathlib
import random
import tempfile
import time

from noisy_neighbour import Client, configuration, found, register, store
from server import ROOT, Server


def is_writing(server):
    adapters = server.http("/status")["storage_manager"]["l2_adapters"]
    waits = any(adapter["pending_keys_count"] for adapter in adapters)
    return waits or server.metric("lmcache_mp_num_inflight_l2_stores") > 0


def measure(program, settings):
    with tempfile.TemporaryDirectory(dir=settings.directory) as directory:
        storage = {"type": "fs", "base_path": f"{directory}/storage"}
        flags = ["--l1-size-gb", 0.25, "--config", configuration(directory, []), "--l2-adapter", json.dumps(storage)]
        with Server(program, *flags) as server:
            client = Client(f"{directory}/noisy.sock")
            segment = os.open(f"/dev/shm/{register(client, os.getpid())}", os.O_RDWR)
            seeds, begun = 0, time.monotonic()
            while time.monotonic() < begun + settings.seconds:
                seeds += 1
                store(client, os.getpid(), segment, seeds, settings.chunks)
            rate = seeds * settings.chunks / (time.monotonic() - begun)
            os.close(segment)
            while is_writing(server):
                time.sleep(0.05)
            server.http("/cache/clear", "POST")
            written = server.metric("lmcache_mp_l2_store_completed_requests_total") / (seeds * settings.chunks)
            # Which ones are written has a pattern, which an even choice might share.
            asked = random.sample(range(1, seeds + 1), min(400, seeds))
            hits = [found(client, seed, settings.chunks) for seed in asked]
            return rate, written, sum(hits) / (len(hits) * settings.chunks)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", type=pathlib.Path, default=ROOT / "target/release/stockade")
    parser.add_argument("--beside", type=pathlib.Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--directory")
    settings = parser.parse_args()
    print("| server | chunks stored a second | written | found |\n|---|---|---|---|")
    for _ in range(settings.rounds):
        for name, program in ("server", settings.server), ("beside", settings.beside):
            if program:
                rate, written, found_part = measure(program, settings)
                print(f"| {name} | {rate:.0f} | {written:.3f} | {found_part:.3f} |", flush=True)


if __name__ == "__main__":
    main()
