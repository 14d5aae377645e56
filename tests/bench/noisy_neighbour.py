#!/usr/bin/env python3
"""What one tenant's noise costs another: memory, requests, large requests and plugins.

    python3 tests/bench/noisy_neighbour.py [--server PROGRAM] [--rounds 8] [--seconds 3]
        [--server-cpus 0-3] [--client-cpus 4-7]

A server with a listener and a tenant each for `quiet`, `noisy` and three equals is started here, with a
pool of 256 MiB. Prints a table:

* memory: `noisy` stores ten times the pool while `quiet` is idle; how much of its floor is still there.
* requests, large requests, plugins: the latency of `quiet`'s calls in windows with and without the
  noise, which take turns; p50, p99, and the ratio.
* equals: three tenants of one weight and one of weight 3 flood at once; requests a second of each, and
  Jain's index of what each got per unit of weight (1 is fair, 1/n is one tenant taking all).

The noise is made by processes of its own. On a machine whose cores are all taken by them, the quiet
client waits for a core before the server ever sees its request: give the server and the clients cores of
their own with --server-cpus and --client-cpus, or read the ratios with that in mind. The line `cores`
shows how many were left for each.
"""

import argparse
import json
import multiprocessing
import os
import pathlib
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.request

import msgspec
import zmq

ROOT = pathlib.Path(__file__).resolve().parents[2]
GUEST = ROOT / "tests/guests/endless_loop.wat"
CHUNK = 256
POOL_MIB = 256
FLOOR_MIB = 64
CHUNK_BYTES = 1 << 20
# 2 (key and value) x 8 layers x 256 tokens x 128 x 2 bytes
LAYOUT = {"num_layers": 8, "hidden_dim_size": 128, "dtype_str": "float16"}
EQUALS = {"one": 1, "two": 1, "three": 1, "heavy": 3}


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def cpus(text):
    found = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


def http(method, url):
    request = urllib.request.Request(url, method=method)
    with urllib.request.urlopen(request, timeout=60) as answer:
        body = answer.read()
    return json.loads(body) if body.startswith((b"{", b"[")) else body.decode()


class Client:
    def __init__(self, url):
        self.socket = zmq.Context.instance().socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.connect(url)
        self.uid = 0

    def send(self, operation, *arguments):
        self.uid += 1
        frames = [msgspec.msgpack.encode(part) for part in (self.uid, operation, *arguments)]
        self.socket.send_multipart(frames)

    def receive(self):
        if not self.socket.poll(60_000):
            raise SystemExit("no answer within a minute")
        frames = self.socket.recv_multipart()
        return msgspec.msgpack.decode(frames[2]) if len(frames) > 2 else None

    def call(self, operation, *arguments):
        self.send(operation, *arguments)
        return self.receive()


def key(tokens, request, rank=None):
    return {
        "model_name": "m", "world_size": 1, "worker_id": rank, "token_ids": tokens, "start": 0,
        "end": len(tokens), "request_id": request, "cache_salt": "", "request_configs": None,
        "num_kv_readers": 1,
    }


def register(client, instance):
    context = {
        "instance_id": instance, "model_name": "m", "world_size": 1, "block_size": 16,
        "use_mla": False, "num_physical_slots": None, **LAYOUT,
    }
    return client.call("register_kv_cache_engine_driven_context", context)["shm_name"]


def prompt(seed, chunks):
    return [(seed * 7919 + index) % 150_000 for index in range(chunks * CHUNK)]


def store(client, instance, segment, seed, chunks=1):
    """Stores a prompt of its own through the segment; whether it was taken."""
    tokens = prompt(seed, chunks)
    request = f"s{seed}"
    reply = client.call("prepare_store", key(tokens, request, 0), instance)
    context = reply["context"]
    slots = context.get("slots", [])
    with open(segment, "r+b", buffering=0) as pool:
        for slot in slots:
            os.pwrite(pool.fileno(), bytes([seed % 251]) * slot["length"], slot["offset"])
    taken = client.call("commit_store", key(tokens, request, 0), instance, b"") if slots else False
    client.call("end_session", request)
    return taken


def found(client, seed, chunks=1):
    request = f"f{seed}"
    client.call("lookup", key(prompt(seed, chunks), request), 1)
    chunks_found = client.call("query_prefetch_status", request)
    client.call("end_session", request)
    return chunks_found


def flood(url, kind, going, stop, served):
    """Keeps requests in flight while `going`; counts answers."""
    client = Client(url)
    depth = 4 if kind == "large" else 32
    tokens = list(range(131_072 if kind == "large" else 1024))
    number = 0
    while not stop.is_set():
        if not going.wait(0.1):
            continue
        for _ in range(depth):
            number += 1
            if kind == "noop":
                client.send("noop")
            else:
                client.send("lookup", key(tokens, f"{os.getpid()}-{number % 64}"), 1)
        for _ in range(depth):
            client.receive()
        with served.get_lock():
            served.value += depth


class Noise:
    def __init__(self, url, kind, processes):
        context = multiprocessing.get_context("spawn")
        self.going, self.stop = context.Event(), context.Event()
        self.served = context.Value("Q", 0)
        arguments = (url, kind, self.going, self.stop, self.served)
        self.children = [context.Process(target=flood, args=arguments, daemon=True) for _ in range(processes)]
        for child in self.children:
            child.start()

    def end(self):
        self.stop.set()
        self.going.set()
        for child in self.children:
            child.join(20)
            if child.is_alive():
                child.kill()


def window(client, seconds, times):
    end = time.monotonic() + seconds
    tokens = list(range(1024))
    number = 0
    while time.monotonic() < end:
        number += 1
        begun = time.perf_counter()
        client.call("noop")
        pinged = time.perf_counter()
        request = f"q{number}"
        client.call("lookup", key(tokens, request), 1)
        client.call("query_prefetch_status", request)
        times["noop"].append(pinged - begun)
        times["lookup"].append(time.perf_counter() - pinged)
        client.call("end_session", request)


def percentile(values, share):
    values = sorted(values)
    return values[min(len(values) - 1, int(len(values) * share))] * 1e3


def compare(name, client, settings, begin, end):
    times = {kind: {"noop": [], "lookup": []} for kind in ("calm", "noise")}
    window(client, 0.5, {"noop": [], "lookup": []})
    for _ in range(settings.rounds):
        window(client, settings.seconds, times["calm"])
        begin()
        time.sleep(0.2)
        window(client, settings.seconds, times["noise"])
        end()
        time.sleep(0.2)
    for operation in ("noop", "lookup"):
        for share in (0.5, 0.99):
            calm, noise = (percentile(times[kind][operation], share) for kind in ("calm", "noise"))
            print(
                f"| {name} | quiet's {operation} p{share * 100:.0f} | {calm:.3f} ms | {noise:.3f} ms | "
                f"{noise / calm:.2f} |"
            )


def steer(base, names, action, state):
    for name in names:
        http("POST", f"{base}/v1/plugins/{name}/{action}")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        plugins = http("GET", f"{base}/v1/plugins")["plugins"]
        if all(plugin["state"] == state for plugin in plugins):
            return
        time.sleep(0.05)
    raise SystemExit(f"the plugins did not become {state}")


def configuration(directory, names, spinning):
    text = ""
    for name in names:
        text += f'[[listener]]\nname = "{name}"\nendpoint = "ipc://{directory}/{name}.sock"\n'
        text += f'[tenants.{name}]\nsalts = ["{name}"]\nlisteners = ["{name}"]\n'
        text += f"weight = {EQUALS.get(name, 1)}\n"
        if name == "quiet":
            text += f"floor_gb = {FLOOR_MIB / 1024}\n"
        if name == "noisy":
            text += f"plugins = {json.dumps(spinning)}\n"
    path = pathlib.Path(directory, "stockade.toml")
    path.write_text(text)
    return str(path)


def measure(directory, base, settings, spinning):
    def url(name):
        return f"ipc://{directory}/{name}.sock"

    print("| noise | measured | calm | noisy | ratio |\n|---|---|---|---|---|")
    quiet, noisy = Client(url("quiet")), Client(url("noisy"))
    segment = f"/dev/shm/{register(quiet, 1)}"
    register(noisy, 1)
    kept = FLOOR_MIB * (1 << 20) // CHUNK_BYTES
    for seed in range(kept):
        assert store(quiet, 1, segment, seed), "quiet could not store"
    before = sum(found(quiet, seed) for seed in range(kept))
    for seed in range(10 * POOL_MIB * (1 << 20) // CHUNK_BYTES):
        store(noisy, 1, segment, 1_000_000 + seed)
    after = sum(found(quiet, seed) for seed in range(kept))
    print(f"| memory | quiet's floor, chunks of 1 MiB found | {before} | {after} | {after / before:.2f} |", flush=True)

    for kind, processes in (("noop", 4), ("lookup", 4), ("large", 2)):
        noise = Noise(url("noisy"), kind, processes)
        compare(f"{kind} flood", quiet, settings, noise.going.set, noise.going.clear)
        noise.end()
    compare(
        f"{len(spinning)} spinning plugins", quiet, settings,
        lambda: steer(base, spinning, "start", "running"), lambda: steer(base, spinning, "stop", "stopped"),
    )

    floods = {name: Noise(url(name), "lookup", 2) for name in EQUALS}
    for noise in floods.values():
        noise.going.set()
    time.sleep(2)
    before = {name: noise.served.value for name, noise in floods.items()}
    seconds = settings.rounds * settings.seconds
    time.sleep(seconds)
    rates = {name: (noise.served.value - before[name]) / seconds for name, noise in floods.items()}
    for noise in floods.values():
        noise.end()
    got = [rates[name] / weight for name, weight in EQUALS.items()]
    jain = sum(got) ** 2 / (len(got) * sum(value**2 for value in got))
    shown = ", ".join(f"{name} (weight {EQUALS[name]}) {rate:.0f}/s" for name, rate in rates.items())
    print(f"| all flood | {shown} | | Jain's index by weight | {jain:.3f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", default=str(ROOT / "target/release/stockade"))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--plugins", type=int, default=8)
    parser.add_argument("--server-cpus", type=cpus)
    parser.add_argument("--client-cpus", type=cpus)
    settings = parser.parse_args()
    if settings.client_cpus:
        os.sched_setaffinity(0, settings.client_cpus)
    with tempfile.TemporaryDirectory() as directory:
        plugins = pathlib.Path(directory, "plugins")
        plugins.mkdir()
        spinning = [f"spin-{number}" for number in range(settings.plugins)]
        for name in spinning:
            shutil.copy(GUEST, plugins / f"{name}.wat")
            manifest = "stop_grace_seconds = 0\n[limits]\ncpu_percent = 100\n"
            (plugins / f"{name}.plugin.toml").write_text(manifest)
        port, http_port = free_port(), free_port()
        config = configuration(directory, ["quiet", "noisy", *EQUALS], spinning)
        command = [
            settings.server, "serve", "--host", "127.0.0.1", "--port", str(port), "--http-port",
            str(http_port), "--l1-size-gb", str(POOL_MIB / 1024), "--plugin-cache-dir", f"{directory}/cache",
            "--runtime-plugin-locations", str(plugins), "--config", config, "--log-level", "error",
        ]

        def pin():
            if settings.server_cpus:
                os.sched_setaffinity(0, settings.server_cpus)

        server = subprocess.Popen(command, preexec_fn=pin, stderr=subprocess.DEVNULL)
        base = f"http://127.0.0.1:{http_port}"
        try:
            deadline = time.monotonic() + 60
            while True:
                try:
                    http("GET", f"{base}/healthcheck")
                    break
                except OSError:
                    if time.monotonic() > deadline or server.poll() is not None:
                        raise SystemExit("the server did not start")
                    time.sleep(0.05)
            cores = len(os.sched_getaffinity(server.pid)), len(os.sched_getaffinity(0))
            print(f"cores: {cores[0]} for the server, {cores[1]} for the clients")
            steer(base, spinning, "stop", "stopped")
            measure(directory, base, settings, spinning)
        finally:
            server.terminate()
            server.wait(timeout=30)


if __name__ == "__main__":
    main()
