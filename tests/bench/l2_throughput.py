#!/usr/bin/env python3
"""What each L2 adapter moves, beside the backend's own tool in the same run, and lookups meanwhile.

    l2_throughput.py STOCKADE [--mib 1024] [--chunk-mib 4] [--rounds 3] [fs] [resp] [s3] [hang]

Needs an interpreter with `pyzmq` and `msgspec`. `resp` needs redis-server and redis-benchmark. `s3` needs
curl and an S3 server: STOCKADE_TEST_VERSITYGW (`go install
github.com/versity/versitygw/cmd/versitygw@v1.8.0`), or STOCKADE_TEST_MOTO (moto_server), which is one
Python process and says more about itself than about us. Take it on a quiet machine and with a
release build; figures are ratios of medians, and the first round is left out. STOCKADE_BENCH_DIR is where
files go.

- write: stores of prompts through shared memory until everything is counted as written. Beside
  it `dd conv=fsync` of the same number of files, four at once; `redis-benchmark SET` with as many
  clients as the adapter has connections; `curl --parallel` PUTs of the same size.
- load: a server with empty memory looks prompts of 16 chunks up, one after the other, until each is locked in
  memory. Beside it `dd`, four at once, of files that were dropped from the page cache, as ours are;
  `redis-benchmark GET`; `curl --parallel` GETs.
- hang: p50 and p99 of lookups that memory answers, with an adapter that never answers beside none.
"""

import argparse
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
ROW = 16
AT_ONCE = 4
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

    def prepare(self):
        """Waits until all memory of the pool has been touched, which competes with everything else."""
        def touched():
            status = pathlib.Path(f"/proc/{self.child.pid}/status").read_text()
            return int(re.search(r"^RssShmem:\s+(\d+) kB$", status, re.M)[1])
        before = -1
        while (now := touched()) > before:
            before = now
            time.sleep(0.5)

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

    def dd(self, count, *operands):
        names = "\n".join(str(self.folder / f"own-{number}") for number in range(count))
        began = time.monotonic()
        subprocess.run(
            ["xargs", "-P", str(AT_ONCE), "-I", "{}", "dd", "status=none", *operands],
            input=names, text=True, check=True,
        )
        return time.monotonic() - began

    def own_write(self, data, count):
        with tempfile.NamedTemporaryFile(dir="/dev/shm") as source:
            source.write(data)
            source.flush()
            return self.dd(count, f"if={source.name}", "of={}", f"bs={len(data)}", "conv=fsync")

    def own_read(self, data, count):
        self.forget()
        return self.dd(count, "if={}", "of=/dev/null", f"bs={len(data)}")

    def forget(self):
        """Drops what is on the disk from the page cache."""
        for file in self.folder.iterdir():
            if file.is_file():
                descriptor = os.open(file, os.O_RDONLY)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)

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

    def own_write(self, data, count):
        return self.own("set", len(data), count)

    def own_read(self, data, count):
        return self.own("get", len(data), count)

    def forget(self):
        pass

    def clear(self):
        subprocess.run(["redis-cli", "-p", str(self.port), "FLUSHALL"], check=True, stdout=subprocess.DEVNULL)

    def stop(self):
        self.child.terminate()
        self.child.wait()


class S3:
    name = "s3"
    ID, SECRET = "bench-id", "bench-secret"

    def __init__(self, folder):
        self.port, self.folder = free_port(), pathlib.Path(folder)
        gateway = os.environ.get("STOCKADE_TEST_VERSITYGW")
        if gateway:
            objects = self.folder / "objects"
            objects.mkdir()
            command = [
                gateway, "--access", self.ID, "--secret", self.SECRET, "--keep-alive", "--quiet",
                "--port", f"127.0.0.1:{self.port}", "posix", str(objects),
            ]
        else:
            program = os.environ.get("STOCKADE_TEST_MOTO", "moto_server")
            command = [program, "-H", "127.0.0.1", "-p", str(self.port)]
        self.child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until("the S3 server", lambda: listens(self.port))
        self.number = 0
        self.clear()

    def curl(self, transfers):
        """Does all of them with one curl, as many at once as the adapter does."""
        common = (
            f'aws-sigv4 = "aws:amz:us-east-1:s3"\nuser = "{self.ID}:{self.SECRET}"\nsilent\nfail\nno-progress-meter\n'
            'header = "x-amz-content-sha256: UNSIGNED-PAYLOAD"\nheader = "Expect:"\n'
        )
        config = "next\n".join(common + it for it in transfers)
        began = time.monotonic()
        subprocess.run(
            ["curl", "--parallel", "--parallel-immediate", "--parallel-max", "16", "--config", "-"],
            input=config, text=True, check=True, stdout=subprocess.DEVNULL,
        )
        return time.monotonic() - began

    def url(self, path):
        return f'url = "http://127.0.0.1:{self.port}/{path}"\n'

    def own_write(self, data, count):
        with tempfile.NamedTemporaryFile(dir="/dev/shm") as source:
            source.write(data)
            source.flush()
            put = f'upload-file = "{source.name}"\n'
            return self.curl([self.url(f"{self.bucket}/own-{it}") + put for it in range(count)])

    def own_read(self, data, count):
        self.forget()
        discard = 'output = "/dev/null"\n'
        return self.curl([self.url(f"{self.bucket}/own-{it}") + discard for it in range(count)])

    def forget(self):
        for file in self.folder.glob("objects/**/*"):
            if file.is_file():
                descriptor = os.open(file, os.O_RDONLY)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)

    def clear(self):
        """A bucket of its own for each part of a round; the old ones go with the folder."""
        self.number += 1
        self.bucket = f"bucket-{self.number}"
        self.curl([self.url(self.bucket) + 'request = "PUT"\n'])
        self.adapter = {
            "type": "s3", "s3_endpoint": f"127.0.0.1:{self.port}", "s3_bucket": self.bucket,
            "s3_region": "us-east-1", "disable_tls": True,
            "aws_access_key_id": self.ID, "aws_secret_access_key": self.SECRET,
        }

    def stop(self):
        self.child.terminate()
        self.child.wait()


def adapter_throughput(arguments, backend):
    chunk = arguments.chunk_mib << 20
    rows = max(1, arguments.mib // arguments.chunk_mib // ROW)
    count = rows * ROW
    mib = count * arguments.chunk_mib
    prompts = [[random.randrange(150_000) for _ in range(CHUNK * ROW)] for _ in range(rows)]
    data = random.randbytes(chunk)
    writes, reads = [], []
    for number in range(arguments.rounds + 1):
        backend.clear()
        own_write = backend.own_write(data, count)
        own_read = backend.own_read(data, count)
        backend.clear()
        server = Server(arguments.stockade, backend.adapter, mib + 64)
        server.register(chunk)
        server.prepare()
        began = time.monotonic()
        for tokens in prompts:
            server.store(tokens, data)
        stored = "lmcache_mp_l2_store_completed_requests_total"
        until("everything written", lambda: server.metric(stored) >= count)
        write = time.monotonic() - began
        server.stop()
        backend.forget()
        server = Server(arguments.stockade, backend.adapter, mib + 64, ["--l2-prefetch-policy", "retain",
                        "--l2-prefetch-deadline-seconds", "120", "--l2-lookup-deadline-seconds", "30"])
        server.register(chunk)
        server.prepare()
        began = time.monotonic()
        for index, tokens in enumerate(prompts):
            found = server.lookup(tokens, f"r{index}")
            assert found == ROW, f"{found} of {ROW} chunks"
        read = time.monotonic() - began
        server.stop()
        first = "" if number else " (left out)"
        print(
            f"{backend.name} round {number}{first}: write {mib / write:.0f} MiB/s (own {mib / own_write:.0f}), "
            f"load {mib / read:.0f} MiB/s (own {mib / own_read:.0f})",
            flush=True,
        )
        if number:
            writes.append(own_write / write)
            reads.append(own_read / read)
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
