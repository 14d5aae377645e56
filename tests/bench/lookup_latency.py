#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Latency of lookups on two servers, taking turns: lookup_latency.py URL_A URL_B  (pyzmq, msgspec)

Both must have chunks of 256 tokens and serve engine-driven clients. Prints medians in ms and the
ratio B / A. A miss is lookup, query_prefetch_status and end_session; a hit is lookup,
query_prefetch_status, free_lookup_locks and end_session.
"""

import itertools
import random
import statistics
import sys
import time

import msgspec
import zmq

MODEL = "lookup-latency"
INSTANCE = 1
CHUNK = 256
PATIENCE_MS = 30_000
SIZES = (1024, 8192, 32768, 131072)
encode = msgspec.msgpack.encode


class Client:
    def __init__(self, url):
        self.socket = zmq.Context.instance().socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.connect(url)
        self.uid = 0

    def call(self, operation, *payload):
        self.uid += 1
        self.socket.send_multipart([encode(self.uid), encode(operation), *payload])
        if not self.socket.poll(PATIENCE_MS):
            sys.exit(f"no reply to operation {operation} within {PATIENCE_MS} ms")
        return self.socket.recv_multipart()


def key(tokens, request_id, rank=None):
    return encode(
        {
            "model_name": MODEL,
            "world_size": 1,
            "worker_id": rank,
            "token_ids": tokens,
            "start": 0,
            "end": len(tokens),
            "request_id": request_id,
            "cache_salt": "",
            "request_configs": None,
            "num_kv_readers": 1,
        }
    )


def compare(name, clients, prepare, measured, rounds):
    times = [[] for _ in clients]
    for _ in range(rounds):
        for client, taken in zip(clients, times):
            arguments = prepare()
            start = time.perf_counter()
            measured(client, *arguments)
            taken.append(time.perf_counter() - start)
    a, b = (statistics.median(taken) * 1e3 for taken in times)
    print(f"| {name} | {a:.3f} | {b:.3f} | {b / a:.1f} |", flush=True)


def main(urls):
    clients = [Client(url) for url in urls]
    layout = {
        "instance_id": INSTANCE,
        "model_name": MODEL,
        "world_size": 1,
        "block_size": 16,
        "num_layers": 1,
        "hidden_dim_size": 8,
        "dtype_str": "float16",
        "use_mla": False,
        "num_physical_slots": CHUNK,
    }
    for client in clients:
        client.call(14, encode(layout))
    numbers = itertools.count()
    dice = random.Random(1)

    def prompt(size):
        return [dice.randrange(150_000) for _ in range(size)]

    def request(tokens):
        request_id = f"lookup-latency-{next(numbers)}"
        return key(tokens, request_id), encode(request_id)

    def miss(client, packed, request_id):
        client.call(8, packed, encode(1))
        client.call(9, request_id)
        client.call(13, request_id)

    compare("noop", clients, tuple, lambda client: client.call(24), 500)
    for size in SIZES:
        rounds = 40 if size > 30_000 else 80
        compare(f"miss, {size} tokens", clients, lambda size=size: request(prompt(size)), miss, rounds)
    for size in SIZES:
        tokens = prompt(size)
        for client in clients:
            stored = key(tokens, f"lookup-latency-store-{size}", 0)
            client.call(16, stored, encode(INSTANCE))
            if client.call(17, stored, encode(INSTANCE), encode(b""))[2] != encode(True):
                sys.exit("a store was not committed")

        def hit(client, packed, request_id, size=size):
            client.call(8, packed, encode(1))
            if client.call(9, request_id)[2] != encode(size // CHUNK):
                sys.exit("a lookup did not find what was stored")
            client.call(12, packed, encode(1))
            client.call(13, request_id)

        rounds = 40 if size > 30_000 else 80
        compare(f"hit, {size} tokens", clients, lambda tokens=tokens: request(tokens), hit, rounds)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(sys.argv[1:])
