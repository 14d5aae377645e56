#!/usr/bin/env python3
"""What CURVE costs: the same calls by libzmq through an open listener and a CURVE one of the same server,
in turns.

    python3 tests/bench/curve.py [--server PROGRAM] [--rounds 5] [--seconds 2]

Prints p50 and p99 of a noop and of lookups, each with its status and end, in milliseconds. The client pays for
encryption too. Needs pyzmq and msgspec.
"""

import argparse
import pathlib
import tempfile
import time

import zmq

from server import ROOT, Server
from spinning_plugins import Client, key, percentile


def configuration(directory, server, client):
    files = {}
    for name, text in (("key", server[1].decode()), ("users", f"it:{client[0].decode()}")):
        files[name] = pathlib.Path(directory, name)
        files[name].touch(mode=0o600)
        files[name].write_text(text + "\n")
    path = pathlib.Path(directory, "stockade.toml")
    path.write_text(
        f'[[listener]]\nname = "open"\nendpoint = "ipc://{directory}/open.sock"\n'
        f'[[listener]]\nname = "curve"\nendpoint = "ipc://{directory}/curve.sock"\nmechanism = "curve"\n'
        f'secret-key-file = "{files["key"]}"\nusers-file = "{files["users"]}"\n'
    )
    return path


def window(client, operation, seconds):
    times = []
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        begun = time.perf_counter()
        if operation is None:
            client.call("noop")
        else:
            client.call("lookup", key(operation, "r"), 1)
            client.call("query_prefetch_status", "r")
            client.call("end_session", "r")
        times.append(time.perf_counter() - begun)
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", type=pathlib.Path, default=ROOT / "target/release/stockade")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2)
    settings = parser.parse_args()
    server, own = zmq.curve_keypair(), zmq.curve_keypair()
    with tempfile.TemporaryDirectory() as directory:
        flags = ["--l1-size-gb", 0.0625, "--config", configuration(directory, server, own)]
        with Server(settings.server, *flags):
            keyed = zmq.Context()
            for option, value in (("CURVE_SERVERKEY", server[0]), ("CURVE_PUBLICKEY", own[0]), ("CURVE_SECRETKEY", own[1])):
                keyed.setsockopt(getattr(zmq, option), value)
            clients = {"open": Client(zmq.Context(), f"ipc://{directory}/open.sock"), "curve": Client(keyed, f"ipc://{directory}/curve.sock")}
            print("| call | open p50 | curve p50 | x | open p99 | curve p99 | x |\n|---|---|---|---|---|---|---|")
            for name, operation in [("noop", None)] + [(f"lookup, {count} tokens", list(range(count))) for count in (1024, 32_768, 131_072)]:
                times = {listener: [] for listener in clients}
                for turn in range(settings.rounds):
                    for listener in sorted(clients, reverse=turn % 2 == 0):
                        times[listener] += window(clients[listener], operation, settings.seconds)
                cells = []
                for share in (0.5, 0.99):
                    plain, sealed = (percentile(times[listener], share) for listener in ("open", "curve"))
                    cells += [f"{plain:.3f}", f"{sealed:.3f}", f"{sealed / plain:.2f}"]
                print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
