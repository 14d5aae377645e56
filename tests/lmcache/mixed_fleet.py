#!/usr/bin/env python3
"""LMCache 0.5.6 and Stockade share one second tier: what one stored, the other finds, byte by byte.

    mixed_fleet.py STOCKADE LMCACHE [fs] [resp] [s3]

LMCACHE is the `lmcache` program of an installation of LMCache 0.5.6, whose Python runs this. For a
directory (`fs`), a Redis of its own (`resp`, needs redis-server) and a bucket of its own (`s3`, needs moto_server
and that mounts are allowed), in both directions: a writer
stores two chunks through LMCache's own worker adapter and is stopped once they are in storage; a
reader with empty memory finds them, loads them, and the tensors are compared. Then both write the
same KV to storage of their own, and names and bytes are compared.
"""

import http.client
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request

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


def answers(port):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthcheck", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


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
        # LMCache opens its ports before it answers on them.
        until(f"{kind} (log in {self.log})", lambda: answers(http), self.child)
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


class Bucket:
    """LMCache speaks to virtual hosts only, so the bucket's name is made to lead here."""

    kind, HOST = "s3", "fleet.s3.amazonaws.com"

    def __init__(self, folder):
        self.port = free_port()
        program = os.environ.get("STOCKADE_TEST_MOTO", "moto_server")
        with open(pathlib.Path(folder) / f"moto-{self.port}.log", "wb") as log:
            self.child = subprocess.Popen(
                [program, "-H", "127.0.0.1", "-p", str(self.port)], stdout=log, stderr=log
            )
        until("moto", lambda: listens(self.port), self.child)
        self.request("PUT", "")
        self.adapter = json.dumps({
            "type": "s3", "s3_endpoint": f"{self.HOST}:{self.port}", "s3_region": "us-east-1",
            "disable_tls": True, "s3_prefer_http2": False,
            "aws_access_key_id": "id", "aws_secret_access_key": "secret",
        })

    def request(self, method, path):
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        connection.request(method, f"/{path}", headers={"Host": f"{self.HOST}:{self.port}", "Authorization": SIGNED})
        answer = connection.getresponse()
        data = answer.read()
        assert answer.status == 200, (method, path, answer.status, data)
        return data

    def values(self):
        listing = self.request("GET", "?list-type=2").decode()
        names = re.findall(r"<Key>([^<]+)</Key>", listing)
        return {it: self.request("GET", urllib.parse.quote(it)) for it in names}

    def stop(self):
        self.child.terminate()
        self.child.wait()

    @classmethod
    def lead_here(cls):
        """Runs this program again where the bucket's host is this machine."""
        try:
            if socket.gethostbyname(cls.HOST) == "127.0.0.1":
                return
        except OSError:
            pass
        hosts = f"127.0.0.1 localhost {cls.HOST}\n"
        mount = f"printf '{hosts}' > /run/hosts && mount --bind /run/hosts /etc/hosts"
        user = [] if os.geteuid() == 0 else ["--map-root-user"]
        script = f'mount -t tmpfs none /run && {mount} && exec "$@"'
        command = ["unshare", *user, "--mount", "sh", "-c", script, "sh", sys.executable, *sys.argv]
        os.execvp(command[0], command)


# moto wants a signature and does not check it.
SIGNED = (
    "AWS4-HMAC-SHA256 Credential=id/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
)


def connect(server):
    """An engine; LMCache's server may take longer to answer on a busy machine than its client waits."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return Engine(server.url)
        except ConnectionError:
            if time.monotonic() > deadline or server.child.poll() is not None:
                raise


def fill(engine, seed):
    generator = torch.Generator().manual_seed(seed)
    for layer in engine.kv.layers.values():
        layer.copy_(torch.rand(layer.shape, generator=generator))
    return torch.randint(0, 1000, (TOKENS,), generator=generator).tolist()


def write(kind, programs, storage, folder, seed):
    server = Server(kind, programs, storage.adapter, folder)
    engine = connect(server)
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
    engine = connect(server)
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
    stores = {"fs": Directory, "resp": Redis, "s3": Bucket}
    if not kinds or "s3" in kinds:
        Bucket.lead_here()
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
