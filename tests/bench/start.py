#!/usr/bin/env python3
"""From the start of the process to the first reply to a request, and what an idle server holds.

    python3 tests/bench/start.py [--server PROGRAM] [--starts 15]

The request is a `noop` over the wire: a greeting, a READY and one message, so that nothing but the server is timed.
"""

import argparse
import pathlib
import re
import socket
import statistics
import subprocess
import tempfile
import time

from server import ROOT

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"NULL".ljust(20, b"\0") + bytes(32)
READY = b"\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"
# A uid of 1 and the operation by name, as msgpack.
NOOP = bytes([1, 1, 1]) + bytes([0, 5]) + b"\xa4noop"


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def first_reply(port, deadline):
    while time.monotonic() < deadline:
        try:
            connection = socket.create_connection(("127.0.0.1", port), timeout=10)
        except ConnectionRefusedError:
            time.sleep(0.0002)
            continue
        with connection:
            connection.sendall(GREETING + bytes([4, len(READY)]) + READY + NOOP)
            received = b""
            while b"\xa4noop" not in received:
                piece = connection.recv(4096)
                if not piece:
                    raise SystemExit("the server closed the connection")
                received += piece
        return
    raise SystemExit("the server does not answer")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--server", default=ROOT / "target/release/stockade", type=pathlib.Path)
    parser.add_argument("--starts", default=15, type=int)
    settings = parser.parse_args()
    times, memory = [], {}
    for number in range(settings.starts):
        with tempfile.TemporaryDirectory() as directory:
            port, segment = free_port(), f"stockade-start-{free_port()}"
            command = [str(settings.server), "serve", "--host", "127.0.0.1", "--port", str(port), "--http-port", "0"]
            command += ["--l1-size-gb", "1", "--shm-name", segment, "--plugin-cache-dir", directory, "--log-level", "error"]
            begun = time.monotonic()
            server = subprocess.Popen(command, stdin=subprocess.DEVNULL)
            try:
                first_reply(port, begun + 60)
                times.append((time.monotonic() - begun) * 1e3)
                if number == 0:
                    time.sleep(1.5)
                    status = pathlib.Path(f"/proc/{server.pid}/status").read_text()
                    for name in ("RssAnon", "RssFile", "Threads"):
                        memory[name] = int(re.search(rf"{name}:\s+(\d+)", status).group(1))
            finally:
                server.terminate()
                server.wait(timeout=30)
                pathlib.Path("/dev/shm", segment).unlink(missing_ok=True)
    print(f"start to first reply, {len(times)} starts: {min(times):.1f} / {statistics.median(times):.1f} / {max(times):.1f} ms (least, median, most)")
    print(f"idle: {memory['RssAnon'] / 1024:.1f} MiB of its own, {memory['RssFile'] / 1024:.1f} MiB of files, {memory['Threads']} threads")
    print(f"program: {settings.server.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
