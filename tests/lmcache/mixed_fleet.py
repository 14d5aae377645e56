#!/usr/bin/env python3
"""LMCache 0.5.6 and Stockade share one second tier: what one stored, the other finds, byte by byte.

    mixed_fleet.py STOCKADE LMCACHE [fs] [resp]

LMCACHE is the `lmcache` program of an installation of LMCache 0.5.6, whose Python runs this. For a
directory (`fs`) and a Redis of its own (`resp`, needs redis-server), in both directions: a writer
stores two chunks through LMCache's own worker adapter and is stopped once they are in storage; a
reader with empty memory finds them, loads them, and the tensors are compared. Then both write the
same KV to storage of their own, and names and bytes are compared.
"""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "examples/transformers-cpu"))
from engine import Engine  # noqa: E402

import torch  # noqa: E402

PATIENCE = 120
TOKENS = 512


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def until(what, condition, child=None):
    deadline = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert child is None or child.poll() is None, f"{what}: the process ended, see its log"
        assert time.monotonic() < deadline, f"{what} did not come within {PATIENCE} s"
        time.sleep(0.05)
    return value


def listens(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class Server:
    """One of the two servers with one L2 adapter."""

    def __init__(self, kind, programs, adapter, folder):
        self.kind, self.port, http = kind, free_port(), free_port()
        name = f"mixed-{os.getpid()}-{self.port}"
        command = [
            *programs[kind], "--host", "127.0.0.1", "--port", str(self.port), "--http-port", str(http),
            "--l1-size-gb", "0.25", "--eviction-policy", "LRU", "--shm-name", name,
            "--supported-transfer-mode", "engine_driven", "--l2-adapter", adapter,
        ]
        self.log = pathlib.Path(folder) / f"{kind}-{self.port}.log"
        with open(self.log, "wb") as log:
            environment = dict(os.environ, LMCACHE_TRACK_USAGE="false")
            self.child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
            )
        until(f"{kind} (log in {self.log})", lambda: listens(self.port), self.child)
        self.url = f"tcp://127.0.0.1:{self.port}"

    def stop(self):
        if self.child.poll() is None:
            self.child.send_signal(signal.SIGTERM)
            try:
                self.child.wait(30)
            except subprocess.TimeoutExpired:
                self.child.kill()
                self.child.wait()


class Directory:
    kind = "fs"

    def __init__(self, folder):
        self.path = pathlib.Path(tempfile.mkdtemp(dir=folder))
        self.adapter = f'{{"type": "fs", "base_path": "{self.path}"}}'

    def values(self):
        return {it.name: it.read_bytes() for it in self.path.glob("*.data")}

    def stop(self):
        pass


class Redis:
    kind = "resp"

    def __init__(self, folder):
        self.port = free_port()
        self.child = subprocess.Popen(
            ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir", folder],
            stdout=subprocess.DEVNULL,
        )
        until("redis", lambda: listens(self.port), self.child)
        self.adapter = f'{{"type": "resp", "host": "127.0.0.1", "port": {self.port}}}'

    def command(self, *words):
        with socket.create_connection(("127.0.0.1", self.port)) as connection:
            text = b"*%d\r\n" % len(words)
            for word in words:
                text += b"$%d\r\n%s\r\n" % (len(word), word)
            connection.sendall(text)
            stream = connection.makefile("rb")
            return self.answer(stream)

    def answer(self, stream):
        line = stream.readline()
        if line[:1] == b"*":
            return [self.answer(stream) for _ in range(int(line[1:]))]
        if line[:1] == b"$":
            value = stream.read(int(line[1:]))
            stream.read(2)
            return value
        return line[1:].strip()

    def values(self):
        names = [it for it in self.command(b"KEYS", b"*") if not it.startswith(b"stockade:")]
        return {it.decode(): self.command(b"GET", it) for it in names}

    def stop(self):
        self.child.terminate()
        self.child.wait()


def fill(engine, seed):
    generator = torch.Generator().manual_seed(seed)
    for layer in engine.kv.layers.values():
        layer.copy_(torch.rand(layer.shape, generator=generator))
    return torch.randint(0, 1000, (TOKENS,), generator=generator).tolist()


def write(kind, programs, storage, folder, seed):
    server = Server(kind, programs, storage.adapter, folder)
    engine = Engine(server.url)
    try:
        tokens = fill(engine, seed)
        assert engine.store("store", tokens, list(range(32)))
        until("the values", lambda: len(storage.values()) == 2, server.child)
        values = until("whole values", lambda: settled(storage))
        engine.close()
    finally:
        server.stop()
    return tokens, values


def settled(storage):
    before = storage.values()
    time.sleep(0.2)
    return before if storage.values() == before else None


def read(kind, programs, storage, folder, seed, tokens):
    server = Server(kind, programs, storage.adapter, folder)
    engine = Engine(server.url)
    try:
        # The same bytes as the writer's, in blocks that the reader does not load into.
        fill(engine, seed)
        source, target = list(range(32)), list(range(40, 72))
        found = until("the lookup", lambda: engine.cached_tokens("load", tokens))
        assert found == TOKENS, f"{kind} found {found} tokens"
        assert engine.retrieve("load", tokens, target)
        engine.scheduler.end_session("load")
        for name, layer in engine.kv.layers.items():
            assert torch.equal(layer[:, source], layer[:, target]), f"other bytes in {name}"
        engine.close()
    finally:
        server.stop()


def main():
    stockade, lmcache, *kinds = sys.argv[1:]
    programs = {"stockade": [stockade, "serve"], "lmcache": [lmcache, "server"]}
    stores = {"fs": Directory, "resp": Redis}
    with tempfile.TemporaryDirectory(prefix="mixed-fleet-", ignore_cleanup_errors=True) as folder:
        for kind in kinds or stores:
            written = {}
            for writer, reader in (("lmcache", "stockade"), ("stockade", "lmcache")):
                storage = stores[kind](folder)
                try:
                    tokens, values = write(writer, programs, storage, folder, 7)
                    sizes = ", ".join(f"{name} ({len(value)} bytes)" for name, value in sorted(values.items()))
                    print(f"{kind}: {writer} wrote {sizes}", flush=True)
                    read(reader, programs, storage, folder, 7, tokens)
                    print(f"{kind}: {reader} found and loaded them, every byte equal", flush=True)
                    written[writer] = values
                finally:
                    storage.stop()
            assert written["lmcache"] == written["stockade"], "names or bytes differ"
            print(f"{kind}: both write the same names and the same bytes", flush=True)


main()
