#!/usr/bin/env python3
"""What one tenant's noise costs another: memory, requests, large requests and plugins.

    python3 tests/bench/noisy_neighbour.py [--server PROGRAM] [--rounds 8] [--seconds 2]
        [--server-cpus 0-3] [--client-cpus 4-7] [--only noop,lookup,large,store,limited,plugins,jain]

Two servers are started here, each with a listener and a tenant for `quiet`, `noisy`, `limited` and four
that flood together, and with a pool of 256 MiB. Prints a table:

* floor: `noisy` stores ten times the pool while `quiet` is idle; how much of its floor is still there.
* the others: the latency of `quiet`'s calls, p50 and p99, in windows that take turns: *calm*; *elsewhere*,
  when the same noise goes to the other server; and *here*, when it goes to quiet's own. So `here / calm` is
  what the noise costs, and `here / elsewhere` what of it is this server's doing and not that of a machine
  with other work. `limited` is the flood of a tenant with `requests_per_second`.
* waits for a core: microseconds that the quiet client and the server's threads were runnable and had
  no core, per call (/proc/PID/schedstat). The kernel's part of the latency, which no server can mend.
* jain: three tenants of one weight and one of weight 3 flood at once; requests a second of each, and
  Jain's index of what each got per unit of weight (1 is fair, 1/n is one tenant taking all).

The noise comes from processes under SCHED_IDLE that send messages encoded before, so that they take
what the server and the quiet client leave of the cores. Where there are cores enough, give the servers
and the clients cores of their own all the same.
"""

import argparse
import gc
import json
import multiprocessing
import os
import pathlib
import shutil
import socket
import struct
import sys
import tempfile
import time

import msgspec

from server import ROOT, Server
from spinning_plugins import key, percentile

GUEST = ROOT / "tests/guests/endless_loop.wat"
CHUNK = 256
POOL_MIB = 256
FLOOR_MIB = 64
CHUNK_BYTES = 1 << 20
LIMIT = 2000
# The kernel copies what one call sends before it lets anybody else have the core, and here that is
# one on which the quiet client may run.
PIECE_BYTES = 16 << 10
# 2 (key and value) x 8 layers x 256 tokens x 128 x 2 bytes
LAYOUT = {"num_layers": 8, "hidden_dim_size": 128, "dtype_str": "float16"}
EQUALS = {"one": 1, "two": 1, "three": 1, "heavy": 3}
# Of each noise: who makes it, processes, requests in flight of each, tokens (None for a noop).
FLOODS = {
    "noop": ("noisy", 4, 32, None),
    "lookup": ("noisy", 4, 32, 1024),
    "large": ("noisy", 2, 4, 131_072),
    "limited": ("limited", 4, 32, None),
}


def cpus(text):
    found = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


def encode(operation, *arguments):
    """A ZMTP message of a request; all have the same uid, since nobody here confuses them."""
    frames = [msgspec.msgpack.encode(part) for part in (7, operation, *arguments)]
    message = b""
    for at, frame in enumerate(frames):
        more = at + 1 < len(frames)
        if len(frame) < 256:
            message += bytes([more, len(frame)])
        else:
            message += struct.pack(">BQ", more | 2, len(frame))
        message += frame
    return message


class Client:
    """A DEALER without a thread of its own, so that what is timed is the server."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(60)
        self.socket.connect(path)
        self.buffer = b""
        greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL"
        self.socket.sendall(greeting.ljust(64, b"\0"))
        self.take(64)
        ready = b"\x05READY\x0bSocket-Type\0\0\0\x06DEALER"
        self.socket.sendall(bytes([4, len(ready)]) + ready)
        self.frame()

    def take(self, count):
        while len(self.buffer) < count:
            got = self.socket.recv(1 << 16)
            if not got:
                raise SystemExit("the server has closed the connection")
            self.buffer += got
        taken, self.buffer = self.buffer[:count], self.buffer[count:]
        return taken

    def frame(self):
        flags, length = self.take(2)
        if flags & 2:
            length = int.from_bytes(bytes([length]) + self.take(7))
        return flags, self.take(length)

    def receive(self):
        frames = []
        while True:
            flags, body = self.frame()
            if flags & 4:
                continue
            frames.append(body)
            if not flags & 1:
                return msgspec.msgpack.decode(frames[2]) if len(frames) > 2 else None

    def exchange(self, message):
        self.socket.sendall(message)
        return self.receive()

    def call(self, operation, *arguments):
        return self.exchange(encode(operation, *arguments))


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
    slots = reply["context"].get("slots", [])
    for slot in slots:
        os.pwrite(segment, bytes([seed % 251]) * slot["length"], slot["offset"])
    taken = client.call("commit_store", key(tokens, request, 0), instance, b"") if slots else False
    client.call("end_session", request)
    return taken


def found(client, seed, chunks=1):
    request = f"f{seed}"
    client.call("lookup", key(prompt(seed, chunks), request), 1)
    # None while a second tier is asked.
    while (chunks_found := client.call("query_prefetch_status", request)) is None:
        time.sleep(0.001)
    client.call("end_session", request)
    return chunks_found


def flood(path, depth, tokens, is_idle, going, stop, served):
    """Keeps requests in flight while `going`; counts answers."""
    if is_idle:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    client = Client(path)
    if tokens is None:
        batch = encode("noop") * depth
    else:
        # Of one request, so that every second one is compared with the one before, and the others are
        # of another prompt and hashed anew.
        prompts = [key(list(range(first, first + tokens)), f"flood-{os.getpid()}") for first in (0, 1)]
        one, other = (encode("lookup", prompt, 1) * 2 for prompt in prompts)
        batch = (one + other) * (depth // 4)
    batch = memoryview(batch)
    while not stop.is_set():
        if not going.wait(0.1):
            continue
        for first in range(0, len(batch), PIECE_BYTES):
            client.socket.sendall(batch[first:first + PIECE_BYTES])
        for _ in range(depth):
            client.receive()
        with served.get_lock():
            served.value += depth


def stores(path, is_idle, going, stop, served):
    """Stores prompts one after the other while `going`, so that others must go."""
    if is_idle:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    client = Client(path)
    segment = os.open(f"/dev/shm/{register(client, os.getpid())}", os.O_RDWR)
    seed = os.getpid() * 1_000_000
    while not stop.is_set():
        if not going.wait(0.1):
            continue
        seed += 1
        store(client, os.getpid(), segment, seed, 4)
        with served.get_lock():
            served.value += 1


class Noise:
    def __init__(self, target, arguments, processes):
        context = multiprocessing.get_context("spawn")
        self.going, self.stop = context.Event(), context.Event()
        self.served = context.Value("Q", 0)
        arguments = (*arguments, self.going, self.stop, self.served)
        self.children = [
            context.Process(target=target, args=arguments, daemon=True) for _ in range(processes)
        ]
        for child in self.children:
            child.start()

    def end(self):
        self.stop.set()
        self.going.set()
        for child in self.children:
            child.join(20)
            if child.is_alive():
                child.kill()


def waited(pid):
    """Nanoseconds that each thread of a process has waited for a core."""
    threads = {}
    for thread in pathlib.Path(f"/proc/{pid}/task").iterdir():
        try:
            threads[thread.name] = int((thread / "schedstat").read_text().split()[1])
        except (FileNotFoundError, ProcessLookupError):
            pass  # It has ended.
    return threads


def waited_us(before, after):
    """What the threads that are left have waited in between, all together."""
    return sum(waits - before.get(thread, 0) for thread, waits in after.items()) / 1e3


def window(client, pid, seconds, times):
    tokens = list(range(1024))
    noop = encode("noop")
    lookup = encode("lookup", key(tokens, "quiet"), 1)
    query, end = encode("query_prefetch_status", "quiet"), encode("end_session", "quiet")
    before = waited(os.getpid()), waited(pid)
    calls = 0
    until = time.monotonic() + seconds
    gc.disable()
    while time.monotonic() < until:
        begun = time.perf_counter()
        client.exchange(noop)
        pinged = time.perf_counter()
        client.exchange(lookup)
        client.exchange(query)
        times["noop"].append(pinged - begun)
        times["lookup"].append(time.perf_counter() - pinged)
        client.exchange(end)
        calls += 4
    gc.enable()
    for name, began, process in ("client", before[0], os.getpid()), ("server", before[1], pid):
        times[name].append(waited_us(began, waited(process)) / max(calls, 1))


WINDOWS = ("calm", "elsewhere", "here")


def compare(name, client, pid, settings, noises):
    """`noises` has what begins and what ends the noise, for each window that has one."""
    times = {kind: {"noop": [], "lookup": [], "client": [], "server": []} for kind in WINDOWS}
    window(client, pid, 0.5, {"noop": [], "lookup": [], "client": [], "server": []})
    for turn in range(settings.rounds):
        # Each comes first as often as the others.
        for kind in WINDOWS[turn % 3:] + WINDOWS[:turn % 3]:
            begin, end = noises.get(kind, (None, None))
            if begin:
                begin()
                time.sleep(0.2)
            window(client, pid, settings.seconds, times[kind])
            if end:
                end()
                time.sleep(0.2)
    for operation in ("noop", "lookup"):
        for share in (0.5, 0.99):
            calm, elsewhere, here = (percentile(times[kind][operation], share) for kind in WINDOWS)
            row(name, f"quiet's {operation} p{share * 100:.0f}, ms", f"{calm:.3f}", f"{elsewhere:.3f}",
                f"{here:.3f}", f"{here / calm:.2f}", f"{here / elsewhere:.2f}")
    for who in ("client", "server"):
        waits = (sum(times[kind][who]) / len(times[kind][who]) for kind in WINDOWS)
        row(name, f"{who} waits for a core, us a call", *(f"{wait:.1f}" for wait in waits), "", "")


def row(*cells):
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def configuration(directory, spinning):
    text = ""
    for name in ("quiet", "noisy", "limited", *EQUALS):
        text += f'[[listener]]\nname = "{name}"\nendpoint = "ipc://{directory}/{name}.sock"\n'
        text += f'[tenants.{name}]\nsalts = ["{name}"]\nlisteners = ["{name}"]\n'
        text += f"weight = {EQUALS.get(name, 1)}\n"
        if name == "quiet":
            text += f"floor_gb = {FLOOR_MIB / 1024}\n"
        if name == "noisy":
            text += f"plugins = {json.dumps(spinning)}\n"
        if name == "limited":
            text += f"requests_per_second = {LIMIT}\n"
    path = pathlib.Path(directory, "stockade.toml")
    path.write_text(text)
    return path


def floor(directory):
    quiet, noisy = (Client(f"{directory}/{name}.sock") for name in ("quiet", "noisy"))
    segment = os.open(f"/dev/shm/{register(quiet, 1)}", os.O_RDWR)
    register(noisy, 1)
    kept = FLOOR_MIB * (1 << 20) // CHUNK_BYTES
    for seed in range(kept):
        assert store(quiet, 1, segment, seed), "quiet could not store"
    before = sum(found(quiet, seed) for seed in range(kept))
    for seed in range(10 * POOL_MIB * (1 << 20) // CHUNK_BYTES):
        store(noisy, 1, segment, 1_000_000 + seed)
    after = sum(found(quiet, seed) for seed in range(kept))
    row("memory", "quiet's floor, chunks of 1 MiB found", before, "", after, f"{after / before:.2f}", "")
    os.close(segment)


def jain(directory, settings):
    floods = {
        name: Noise(flood, (f"{directory}/{name}.sock", 16, 8192, False), 2) for name in EQUALS
    }
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
    index = sum(got) ** 2 / (len(got) * sum(value**2 for value in got))
    shown = ", ".join(f"{name} (weight {EQUALS[name]}) {rate:.0f}/s" for name, rate in rates.items())
    row("all flood", shown, "", "", "", f"Jain's index by weight {index:.3f}", "")


def measure(settings, servers, directories, spinning):
    (here, there), (directory, other) = servers, directories
    row("noise", "measured", "calm", "elsewhere", "here", "here / calm", "here / elsewhere")
    print("|---|---|---|---|---|---|---|")
    if "floor" in settings.only:
        floor(directory)
    quiet = Client(f"{directory}/quiet.sock")
    for kind, (tenant, processes, depth, tokens) in FLOODS.items():
        if kind not in settings.only:
            continue
        noises = {
            where: Noise(flood, (f"{at}/{tenant}.sock", depth, tokens, True), processes)
            for where, at in (("here", directory), ("elsewhere", other))
        }
        begin_and_end = {where: (it.going.set, it.going.clear) for where, it in noises.items()}
        compare(f"{kind} flood", quiet, here.pid, settings, begin_and_end)
        for noise in noises.values():
            noise.end()
    if "store" in settings.only:
        noises = {
            where: Noise(stores, (f"{at}/noisy.sock", True), 2)
            for where, at in (("here", directory), ("elsewhere", other))
        }
        begin_and_end = {where: (it.going.set, it.going.clear) for where, it in noises.items()}
        compare("store flood", quiet, here.pid, settings, begin_and_end)
        for noise in noises.values():
            noise.end()
    if "plugins" in settings.only:
        begin_and_end = {
            where: (
                lambda server=server: server.steer(spinning, "start", "running"),
                lambda server=server: server.steer(spinning, "stop", "stopped"),
            )
            for where, server in (("here", here), ("elsewhere", there))
        }
        compare(f"{len(spinning)} spinning plugins", quiet, here.pid, settings, begin_and_end)
    if "jain" in settings.only:
        jain(directory, settings)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", default=str(ROOT / "target/release/stockade"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--plugins", type=int, default=8)
    parser.add_argument("--server-cpus", type=cpus)
    parser.add_argument("--client-cpus", type=cpus)
    parser.add_argument("--only", default="floor,noop,lookup,large,limited,store,plugins,jain")
    settings = parser.parse_args()
    settings.only = settings.only.split(",")
    known = {"floor", "store", "plugins", "jain", *FLOODS}
    if unknown := set(settings.only) - known:
        raise SystemExit(f"--only {','.join(unknown)}: give some of {','.join(sorted(known))}")
    all_cpus = os.sched_getaffinity(0)
    with tempfile.TemporaryDirectory() as scratch:
        plugins = pathlib.Path(scratch, "plugins")
        plugins.mkdir()
        spinning = [f"spin-{number}" for number in range(settings.plugins)]
        for name in spinning:
            shutil.copy(GUEST, plugins / f"{name}.wat")
            manifest = "stop_grace_seconds = 0\n[limits]\ncpu_percent = 100\n"
            (plugins / f"{name}.plugin.toml").write_text(manifest)
        directories = [pathlib.Path(scratch, name) for name in ("here", "there")]
        for directory in directories:
            directory.mkdir()
        flags = [
            ["--l1-size-gb", POOL_MIB / 1024, "--runtime-plugin-locations", plugins, "--config",
             configuration(directory, spinning), "--log-level", "info"]
            for directory in directories
        ]
        # They inherit it.
        os.sched_setaffinity(0, settings.server_cpus or all_cpus)
        with Server(settings.server, *flags[0]) as here, Server(settings.server, *flags[1]) as there:
            os.sched_setaffinity(0, settings.client_cpus or all_cpus)
            cores = len(os.sched_getaffinity(here.pid)), len(os.sched_getaffinity(0))
            print(f"cores: {cores[0]} for the servers, {cores[1]} for the clients")
            for server in (here, there):
                server.steer(spinning, "stop", "stopped")
            measure(settings, (here, there), directories, spinning)


if __name__ == "__main__":
    sys.exit(main())
