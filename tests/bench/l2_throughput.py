#!/usr/bin/env python3
"""What each L2 adapter moves, beside the backend's own tool in the same run, and lookups meanwhile.

    l2_throughput.py STOCKADE [--mib 1024] [--chunk-mib 4] [--rounds 3] [fs] [resp] [s3] [hang]

Needs an interpreter with `pyzmq` and `msgspec`. `resp` needs redis-server and redis-benchmark, `s3` needs
STOCKADE_TEST_MOTO (moto_server) and is compared to plain HTTP requests to the same server. Take
it on a quiet machine and with a release build; figures are ratios of medians, the first round is
left out.

- write-down: stores through shared memory until everything is counted as written, beside `dd
  conv=fsync` of files of the same size, `redis-benchmark SET`, or raw PUTs;
- load: a server with empty memory, a lookup per chunk row, until its status is there, beside `dd` reading the
  same files past the page cache, `redis-benchmark GET`, or raw GETs;
- hang: p50 and p99 of lookups that memory answers, with an adapter that never answers beside none.
"""

import argparse
import http.client
import json
import os
import pathlib
import random
import re
import signal
import socket
import statistics
import subprocess
import tempfile
import time
import urllib.request

import msgspec
import zmq

CHUNK = 256
MODEL = "bench/l2"


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def until(what, condition, seconds=600):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what} did not come within {seconds} s"
        time.sleep(0.005)
    return value


def listens(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class Server:
    def __init__(self, binary, adapter, pool_mib, extra=()):
        self.port, self.http = free_port(), free_port()
        command = [
            binary, "serve", "--host", "127.0.0.1", "--port", str(self.port), "--http-port", str(self.http),
            "--l1-size-gb", str(pool_mib / 1024), "--eviction-trigger-watermark", "1.0", *extra,
        ]
        if adapter:
            command += ["--l2-adapter", json.dumps(adapter)]
        self.child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until("the server", lambda: listens(self.port))
        self.socket = zmq.Context.instance().socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(f"tcp://127.0.0.1:{self.port}")
        self.uid = 0

    def call(self, operation, *arguments):
        self.uid += 1
        frames = [*map(msgspec.msgpack.encode, (self.uid, operation, *arguments))]
        self.socket.send_multipart(frames)
        assert self.socket.poll(120_000), f"operation {operation} is not answered"
        reply = self.socket.recv_multipart()
        return msgspec.msgpack.decode(reply[2]) if len(reply) > 2 else None

    def register(self, chunk_bytes):
        # uint8 with MLA: [layers, slots, hidden]
        context = {
            "instance_id": 1, "model_name": MODEL, "world_size": 1, "block_size": 16, "num_layers": 1,
            "hidden_dim_size": chunk_bytes // CHUNK, "dtype_str": "uint8", "use_mla": True,
            "num_physical_slots": None,
        }
        self.segment = pathlib.Path("/dev/shm") / self.call(14, context)["shm_name"].lstrip("/")

    def key(self, tokens, rank, request):
        return {
            "model_name": MODEL, "world_size": 1, "worker_id": rank, "token_ids": tokens, "start": 0,
            "end": len(tokens), "request_id": request, "cache_salt": "", "request_configs": None,
            "num_kv_readers": 1,
        }

    def store(self, tokens, data):
        key = self.key(tokens, 0, "store")
        context = self.call(16, key, 1)["context"]
        with open(self.segment, "r+b", buffering=0) as segment:
            for slot in context["slots"]:
                os.pwrite(segment.fileno(), data[: slot["length"]], slot["offset"])
        assert self.call(17, key, 1, b"")

    def lookup(self, tokens, request):
        self.call(8, self.key(tokens, None, request), 1)
        found = self.call(10, request, 100.0)
        self.call(13, request)
        return found

    def metric(self, name):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.http}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(it.rsplit(" ", 1)[1]) for it in lines if re.match(rf"{name}[ {{]", it))

    def stop(self):
        self.socket.close()
        self.child.send_signal(signal.SIGTERM)
        self.child.wait(60)


class Fs:
    name = "fs"

    def __init__(self, folder):
        self.folder = pathlib.Path(folder) / "fs"
        self.folder.mkdir()
        self.adapter = {"type": "fs", "base_path": str(self.folder)}

    def own_write(self, chunk, count):
        target = self.folder / "own"
        began = time.monotonic()
        for number in range(count):
            subprocess.run(
                ["dd", "if=/dev/zero", f"of={target}-{number}", f"bs={chunk}", "count=1", "conv=fsync"],
                check=True, stderr=subprocess.DEVNULL,
            )
        return time.monotonic() - began

    def own_read(self, chunk, count):
        began = time.monotonic()
        for number in range(count):
            subprocess.run(
                ["dd", f"if={self.folder}/own-{number}", "of=/dev/null", f"bs={chunk}", "iflag=nocache"],
                check=True, stderr=subprocess.DEVNULL,
            )
        return time.monotonic() - began

    def clear(self):
        for file in self.folder.iterdir():
            if file.is_file():
                file.unlink()

    def stop(self):
        pass


class Resp:
    name = "resp"

    def __init__(self, folder):
        self.port = free_port()
        self.child = subprocess.Popen(
            ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir", folder],
            stdout=subprocess.DEVNULL,
        )
        until("redis", lambda: listens(self.port))
        self.adapter = {"type": "resp", "host": "127.0.0.1", "port": self.port}

    def own(self, what, chunk, count):
        began = time.monotonic()
        subprocess.run(
            ["redis-benchmark", "-p", str(self.port), "-t", what, "-d", str(chunk), "-n", str(count), "-c", "8", "-q"],
            check=True, stdout=subprocess.DEVNULL,
        )
        return time.monotonic() - began

    def own_write(self, chunk, count):
        return self.own("set", chunk, count)

    def own_read(self, chunk, count):
        return self.own("get", chunk, count)

    def clear(self):
        subprocess.run(["redis-cli", "-p", str(self.port), "FLUSHALL"], check=True, stdout=subprocess.DEVNULL)

    def stop(self):
        self.child.terminate()
        self.child.wait()


class S3:
    name = "s3"

    def __init__(self, folder):
        self.port = free_port()
        program = os.environ.get("STOCKADE_TEST_MOTO", "moto_server")
        self.child = subprocess.Popen(
            [program, "-H", "127.0.0.1", "-p", str(self.port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        until("moto", lambda: listens(self.port))
        self.request("PUT", "/bucket")
        self.adapter = {
            "type": "s3", "s3_endpoint": f"127.0.0.1:{self.port}", "s3_bucket": "bucket", "s3_region": "us-east-1",
            "disable_tls": True, "aws_access_key_id": "id", "aws_secret_access_key": "secret",
        }

    def request(self, method, path, body=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        connection.request(method, path, body)
        answer = connection.getresponse()
        data = answer.read()
        assert answer.status in (200, 204), (method, path, answer.status)
        return data

    def own_write(self, chunk, count):
        body = bytes(chunk)
        began = time.monotonic()
        for number in range(count):
            self.request("PUT", f"/bucket/own-{number}", body)
        return time.monotonic() - began

    def own_read(self, chunk, count):
        began = time.monotonic()
        for number in range(count):
            self.request("GET", f"/bucket/own-{number}")
        return time.monotonic() - began

    def clear(self):
        self.request("POST", "/moto-api/reset")
        self.request("PUT", "/bucket")

    def stop(self):
        self.child.terminate()
        self.child.wait()


def adapter_throughput(arguments, backend):
    chunk, count = arguments.chunk_mib << 20, arguments.mib // arguments.chunk_mib
    prompts = [[random.randrange(150_000) for _ in range(CHUNK)] for _ in range(count)]
    data = random.randbytes(chunk)
    writes, reads = [], []
    for number in range(arguments.rounds + 1):
        backend.clear()
        own_write = backend.own_write(chunk, count)
        own_read = backend.own_read(chunk, count)
        backend.clear()
        server = Server(arguments.stockade, backend.adapter, arguments.mib + 64)
        server.register(chunk)
        began = time.monotonic()
        for tokens in prompts:
            server.store(tokens, data)
        stored = "lmcache_mp_l2_store_completed_requests_total"
        until("everything written", lambda: server.metric(stored) >= count)
        write = time.monotonic() - began
        server.stop()
        server = Server(arguments.stockade, backend.adapter, arguments.mib + 64, ["--l2-prefetch-policy", "retain"])
        server.register(chunk)
        began = time.monotonic()
        for index, tokens in enumerate(prompts):
            assert server.lookup(tokens, f"r{index}") == 1
        read = time.monotonic() - began
        server.stop()
        if number:
            writes.append(own_write / write)
            reads.append(own_read / read)
            print(
                f"{backend.name} round {number}: write {arguments.mib / write:.0f} MiB/s (own {arguments.mib / own_write:.0f}), "
                f"load one by one {arguments.mib / read:.0f} MiB/s (own {arguments.mib / own_read:.0f})",
                flush=True,
            )
    print(
        f"{backend.name}: {arguments.chunk_mib} MiB values, write {statistics.median(writes):.2f} x, "
        f"load {statistics.median(reads):.2f} x the backend's own tool"
    )


def hanging(arguments):
    hung = {
        "type": "fault_inject", "find": "hang", "load": "hang", "store": "hang",
        "inner": {"type": "mock", "max_size_gb": 1, "mock_bandwidth_gb": 10},
    }
    ratios = {}
    for _ in range(arguments.rounds + 1):
        figures = {}
        for name, adapter in (("none", None), ("hanging", hung)):
            server = Server(arguments.stockade, adapter, 256)
            server.register(1 << 16)
            prompts = [[random.randrange(150_000) for _ in range(CHUNK)] for _ in range(64)]
            for tokens in prompts:
                server.store(tokens, bytes(1 << 16))
            times = []
            for index in range(4000):
                began = time.perf_counter()
                assert server.lookup(prompts[index % 64], f"r{index}") == 1
                times.append(time.perf_counter() - began)
            server.stop()
            times.sort()
            figures[name] = (times[len(times) // 2], times[len(times) * 99 // 100])
        for place, quantile in enumerate(("p50", "p99")):
            ratio = figures["hanging"][place] / figures["none"][place]
            ratios.setdefault(quantile, []).append(ratio)
        print({name: [f"{it * 1e6:.0f} us" for it in both] for name, both in figures.items()}, flush=True)
    for quantile, found in ratios.items():
        print(f"hang: lookup {quantile} with a hanging backend is {statistics.median(found[1:]):.2f} x that without")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stockade")
    parser.add_argument("what", nargs="*", default=["fs", "resp", "hang"])
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--chunk-mib", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    backends = {it.name: it for it in (Fs, Resp, S3)}
    with tempfile.TemporaryDirectory(prefix="l2-throughput-", dir=os.environ.get("STOCKADE_BENCH_DIR")) as folder:
        for what in arguments.what:
            if what == "hang":
                hanging(arguments)
                continue
            backend = backends[what](folder)
            try:
                adapter_throughput(arguments, backend)
            finally:
                backend.stop()


main()
