#!/usr/bin/env python3
"""What busy plugins cost the data path: latency of noops and lookups with fifty guests in endless
loops against none, on one server, in windows that take turns (A B A B), which of the two comes first
in turns too.

    python3 tests/bench/spinning_plugins.py [--server PROGRAM] [--plugins 50] [--rounds 10] [--seconds 3]
        [--guest endless_loop]...

Of several guests of tests/guests that never end each gets its part of the plugins: log_flood,
endless_loop_in_host_calls and the like.

The server is started here, with a pool of 64 MiB; everything goes over 127.0.0.1. --assert ends with 1 when
a p99 is more than 1.05 times that without plugins. Needs pyzmq and msgspec.
"""

import argparse
import itertools
import pathlib
import shutil
import sys
import tempfile
import time

import msgspec
import zmq
from server import ROOT, Server


BUDGET = 1.05


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


def key(tokens, request, rank=None):
    return {
        "model_name": "m", "world_size": 1, "worker_id": rank, "token_ids": tokens, "start": 0,
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
        times["noop"].append(pinged - begun)
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
    parser.add_argument("--assert", dest="asserts", action="store_true")
    parser.add_argument("--guest", action="append")
    settings = parser.parse_args()
    guests = itertools.cycle(settings.guest or ["endless_loop"])
    with tempfile.TemporaryDirectory() as directory:
        names = [f"spin-{number}" for number in range(settings.plugins)]
        for name in names:
            shutil.copy(ROOT / f"tests/guests/{next(guests)}.wat", pathlib.Path(directory, f"{name}.wat"))
            manifest = "stop_grace_seconds = 0\n[limits]\ncpu_percent = 100\n"
            pathlib.Path(directory, f"{name}.plugin.toml").write_text(manifest)
        flags = ["--l1-size-gb", "0.0625", "--runtime-plugin-locations", directory]
        with Server(settings.server, *flags) as server:
            client = Client(zmq.Context.instance(), server.url)
            tokens = list(range(1024))
            times = {kind: {"noop": [], "lookup": []} for kind in ("stopped", "running")}
            server.steer([], "start", "running")
            window(client, min(1, settings.seconds), tokens, {"noop": [], "lookup": []})
            for number in range(settings.rounds):
                turns = [("stop", "stopped"), ("start", "running")]
                for action, state in turns if number % 2 == 0 else reversed(turns):
                    server.steer(names, action, state)
                    window(client, settings.seconds, tokens, times[state])
    worst = 0
    for operation in ("noop", "lookup"):
        for share in (0.5, 0.99):
            none, spinning = (percentile(times[kind][operation], share) for kind in ("stopped", "running"))
            ratio = spinning / none
            worst = max(worst, ratio) if share == 0.99 else worst
            print(
                f"{operation:>7} p{share * 100:.0f}: {none:.3f} ms without, {spinning:.3f} ms with "
                f"{settings.plugins} spinning, ratio {ratio:.3f} "
                f"({len(times['stopped'][operation])} and {len(times['running'][operation])} calls)"
            )
    if settings.asserts and worst > BUDGET:
        sys.exit(f"a p99 is {worst:.3f} times that without plugins, above the budget of {BUDGET}")


if __name__ == "__main__":
    main()
