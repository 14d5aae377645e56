#!/usr/bin/env python3
"""A fleet of Stockade and LMCache 0.5.6 under LMCache's own coordinator.

    coordinator.py --server STOCKADE --lmcache PATH/TO/bin/lmcache

Starts `lmcache coordinator`, registers both servers, stores the same prompt in each with LMCache's
client, and prints what the coordinator says: who is there, which keys are where, and what is gone
after a `clear`, a kill -9 with a restart, and a SIGTERM. The keys of both must be the same.
"""

import argparse
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request

os.environ.setdefault("LMCACHE_LOG_LEVEL", "CRITICAL")
os.environ.setdefault("LMCACHE_TRACK_USAGE", "false")
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch  # noqa: E402
import zmq  # noqa: E402
from lmcache.v1.multiprocess.custom_types import IPCCacheServerKey  # noqa: E402
from lmcache.v1.multiprocess.transfer_context.worker_transfer import (  # noqa: E402
    create_transfer_context,
)
from lmcache.v1.multiprocess.transport.factory import RequestClientFactory  # noqa: E402

CHUNK, BLOCK, PATIENCE = 64, 16, 20.0
MODEL = "fleet-model"
instance_ids = itertools.count(80_000)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def get(url):
    with urllib.request.urlopen(url, timeout=5) as answer:
        return json.load(answer)


def post(url, body, method="POST"):
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}, method=method)
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)


def wait_for(what, condition):
    deadline = time.monotonic() + 60
    while True:
        try:
            if found := condition():
                return found
        except (OSError, ValueError):
            pass
        assert time.monotonic() < deadline, f"{what} did not come"
        time.sleep(0.1)


class Process:
    def __init__(self, name, command):
        self.name, self.command = name, command
        self.log = tempfile.NamedTemporaryFile("w+", suffix=f"-{name}.log")
        self.start()

    def start(self):
        self.child = subprocess.Popen(
            self.command, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log)

    def end(self, number):
        self.child.send_signal(number)
        return self.child.wait(30)


class Server(Process):
    def __init__(self, name, command, coordinator):
        self.port, self.http = free_port(), free_port()
        self.storage = tempfile.TemporaryDirectory(prefix=f"{name}-")
        adapter = json.dumps({"type": "fs", "base_path": self.storage.name})
        super().__init__(name, [
            *command, "--host", "127.0.0.1", "--port", str(self.port),
            "--http-host", "127.0.0.1", "--http-port", str(self.http), "--instance-id", name,
            "--l1-size-gb", "0.25", "--chunk-size", str(CHUNK), "--eviction-policy", "LRU",
            "--supported-transfer-mode", "auto", "--shm-name", "",
            "--coordinator-url", coordinator, "--coordinator-advertise-ip", "127.0.0.1",
            "--coordinator-heartbeat-interval", "0.5", "--coordinator-event-reporting",
            "--coordinator-event-flush-interval", "0.2", "--l2-adapter", adapter])

    def store(self, tokens):
        requests = RequestClientFactory.create(f"tcp://127.0.0.1:{self.port}", context=zmq.Context())
        kv = {f"layer.{n}": torch.full((2, 16, 2, BLOCK, 8), n + 1, dtype=torch.bfloat16)
              for n in range(2)}
        worker = create_transfer_context(
            kv, instance_id=next(instance_ids), req_client=requests, mode="engine_driven")
        worker.register(kv, MODEL, 1, CHUNK // BLOCK, PATIENCE)

        def key(request, rank):
            return IPCCacheServerKey(
                model_name=MODEL, world_size=1, worker_id=rank, token_ids=tuple(tokens), start=0,
                end=len(tokens), request_id=request, cache_salt="", request_configs=None,
                num_kv_readers=1)
        blocks = [list(range(1, 1 + len(tokens) // BLOCK))]
        assert worker.submit_store("s", key("s", 0), kv, blocks, None, CHUNK // BLOCK).result(
            timeout=PATIENCE)

        def hit():
            requests.lookup(key("l", None), 1).result(timeout=PATIENCE)
            found = requests.query_prefetch_status("l").result(timeout=PATIENCE)
            requests.end_session("l").result(timeout=PATIENCE)
            return found == len(tokens) // CHUNK
        wait_for("the hit", hit)
        return requests


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--server", required=True)
    parser.add_argument("--lmcache", required=True)
    options = parser.parse_args()
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    coordinator = Process("coordinator", [
        options.lmcache, "coordinator", "--host", "127.0.0.1", "--port", str(port),
        "--chunk-size", str(CHUNK), "--instance-timeout", "3", "--health-check-interval", "1"])
    processes = [coordinator]
    try:
        wait_for("the coordinator", lambda: get(f"{url}/instances") is not None)
        ours = Server("stockade-1", [options.server, "serve"], url)
        processes.append(ours)
        theirs = Server("lmcache-1", [options.lmcache, "server", "--no-l1-use-lazy"], url)
        processes.append(theirs)

        def members():
            found = get(f"{url}/instances")
            found = found.get("instances", found) if isinstance(found, dict) else found
            return {entry["instance_id"]: entry for entry in found}

        def keys(instance, tier="l1"):
            listing = get(f"{url}/directory/keys?instance_id={instance}&tier={tier}")
            return {json.dumps(entry["key"], sort_keys=True) for entry in listing["keys"]}
        wait_for("both servers", lambda: {"stockade-1", "lmcache-1"} <= set(members()))
        print("members:", json.dumps(members()["stockade-1"], sort_keys=True))

        tokens = [random.Random(1).randrange(150_000) for _ in range(3 * CHUNK)]
        requests = ours.store(tokens)
        wait_for("our keys", lambda: len(keys("stockade-1")) == 3)
        theirs.store(tokens)
        wait_for("LMCache's keys", lambda: len(keys("lmcache-1")) == 3)
        assert keys("stockade-1") == keys("lmcache-1"), (keys("stockade-1"), keys("lmcache-1"))
        print("both hold:", *sorted(keys("stockade-1")), sep="\n  ")
        print("usage:", json.dumps(get(f"{url}/instances/stockade-1/usage"), sort_keys=True))
        print("stats:", json.dumps(get(f"{url}/directory/stats"), sort_keys=True)[:600])

        for name in ("stockade-1", "lmcache-1"):
            wait_for(f"what {name} wrote down", lambda name=name: len(keys(name, "l2")) == 3)
        assert keys("stockade-1", "l2") == keys("lmcache-1", "l2") == keys("stockade-1")
        print("both have written them down")

        requests.clear(True).result(timeout=PATIENCE)
        wait_for("the deletions", lambda: not keys("stockade-1"))
        assert len(keys("stockade-1", "l2")) == 3
        assert len(keys("lmcache-1")) == 3
        print("after a clear: ours are gone from memory, and still in storage; LMCache's are there")

        warm = post(f"{url}/cache/prefetches", {
            "instance_id": "stockade-1", "model_name": MODEL, "world_size": 1, "token_ids": tokens})
        print("prefetch:", json.dumps(warm, sort_keys=True))
        status = f"{url}/cache/prefetches/stockade-1/{warm['request_id']}"
        over = wait_for("the prefetch", lambda: (found := get(status))["status"] != "pending" and found)
        assert (over["found_keys"], over["total_keys"]) == (3, 3), over
        wait_for("the keys in memory", lambda: len(keys("stockade-1")) == 3)
        print("after a prefetch that the coordinator passed on: ours are in memory again")
        requests.clear(True).result(timeout=PATIENCE)
        wait_for("the deletions", lambda: not keys("stockade-1"))
        listed = get(f"http://127.0.0.1:{ours.http}/cache/objects")["entries"]
        assert {json.dumps(it["key"], sort_keys=True) for it in listed} == keys("stockade-1", "l2")
        gone = post(f"http://127.0.0.1:{ours.http}/cache/objects", {"keys": [it["key"] for it in listed]}, "DELETE")
        assert gone == {"deleted": 3, "skipped": 0, "ok": True}, gone
        wait_for("the deletions in storage", lambda: not keys("stockade-1", "l2"))
        print("after a deletion by key: ours are gone from storage")

        ours.store(tokens)
        wait_for("our keys again", lambda: len(keys("stockade-1")) == 3)
        ours.end(signal.SIGKILL)
        ours.start()
        wait_for("the restarted server", lambda: get(f"http://127.0.0.1:{ours.http}/status"))
        ours.store([token + 1 for token in tokens])
        wait_for("its keys alone", lambda: len(keys("stockade-1")) == 3
                 and not keys("stockade-1") & keys("lmcache-1"))
        print("after kill -9 and a restart: the old keys are fenced off, the new ones are there")

        coordinator.end(signal.SIGKILL)
        coordinator.start()
        wait_for("the registration again", lambda: "stockade-1" in members())
        print("after a restart of the coordinator: registered again")

        assert ours.end(signal.SIGTERM) == 0
        wait_for("the leave", lambda: "stockade-1" not in members())
        print("after SIGTERM: deregistered")
    except BaseException:
        for process in processes:
            process.log.seek(0)
            print(f"--- {process.name}", process.log.read()[-3000:], file=sys.stderr)
        raise
    finally:
        for process in processes:
            if process.child.poll() is None:
                process.child.kill()
                process.child.wait()
    print("all well")
    sys.stdout.flush()
    os._exit(0)


main()
