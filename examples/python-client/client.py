#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Stores KV chunks in a running server, looks them up, reads them back and compares the bytes.

It speaks the wire protocol itself, with nothing but pyzmq and msgspec, so it also shows what an
engine sends. The server shares a memory pool: the client asks for slots in it, copies its KV bytes
there and commits; to read, it looks a prompt up, gets the slots, copies the bytes out and commits.
"""

import argparse
import enum
import itertools
import random
import sys
import time
import uuid
from multiprocessing import resource_tracker, shared_memory

import msgspec
import zmq

BYTES_PER_FLOAT16 = 2
MODEL = "example-model"
WORLD_SIZE = 1
RANK = 0


class Operation(enum.IntEnum):
    """The numbers under which a request names what it wants."""

    LOOKUP = 8
    QUERY_PREFETCH_STATUS = 9
    WAIT_PREFETCH_STATUS = 10
    FREE_LOOKUP_LOCKS = 12
    END_SESSION = 13
    REGISTER_KV_CACHE_ENGINE_DRIVEN_CONTEXT = 14
    UNREGISTER_KV_CACHE_ENGINE_DRIVEN_CONTEXT = 15
    PREPARE_STORE = 16
    COMMIT_STORE = 17
    PREPARE_RETRIEVE = 18
    COMMIT_RETRIEVE = 19
    GET_CHUNK_SIZE = 21
    NOOP = 24


class ClientError(Exception):
    """Ends the program with one sentence."""


class NoAnswerError(ClientError):
    pass


class Connection:
    """One DEALER socket. A request is [uid, operation, argument...], its reply [uid, operation, result]."""

    def __init__(self, url, timeout_seconds):
        self.timeout_seconds = timeout_seconds
        self.answers = True  # False once a request went unanswered: then there is nothing left to tidy up
        self._uids = itertools.count()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        try:
            self._socket.connect(url)
        except zmq.ZMQError as error:
            self.close()
            raise ClientError(f"{url} is not an address like tcp://127.0.0.1:5555: {error}") from None

    def close(self):
        self._context.destroy(linger=0)

    def call(self, operation, *arguments, timeout_seconds=None):
        """The result of one operation; None where the reply carries none."""
        timeout = self.timeout_seconds if timeout_seconds is None else timeout_seconds
        until = time.monotonic() + timeout
        uid = next(self._uids)
        self._socket.send_multipart([msgspec.msgpack.encode(part) for part in (uid, operation, *arguments)])
        while self._socket.poll(max(0, int((until - time.monotonic()) * 1000))):
            reply = [msgspec.msgpack.decode(frame) for frame in self._socket.recv_multipart()]
            if reply[0] != uid:
                continue  # the late reply of a request that was given up
            if isinstance(reply[1], str) and reply[1].startswith("error: "):
                raise ClientError(f"the server refused {operation.name.lower()}: {reply[1].removeprefix('error: ')}")
            return reply[2] if len(reply) > 2 else None
        self.answers = False
        raise NoAnswerError(f"no answer to {operation.name.lower()} within {timeout:g} s")


class Pool:
    """The server's shared memory, mapped for as long as the `with` block lasts."""

    def __init__(self, name, size_bytes):
        self._size_bytes = size_bytes
        try:
            if sys.version_info >= (3, 13):
                self._memory = shared_memory.SharedMemory(name.lstrip("/"), track=False)
            else:
                self._memory = shared_memory.SharedMemory(name.lstrip("/"))
                # The pool is the server's. Python's tracker would remove it when this process ends.
                resource_tracker.unregister(self._memory._name, "shared_memory")
        except OSError as error:
            raise ClientError(
                f"cannot map the server's memory pool {name}: {error}; "
                "the client must run on the server's machine, in the same IPC namespace"
            ) from None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._memory.close()

    def _range(self, slot, length):
        start, end = slot["offset"], slot["offset"] + slot["length"]
        if slot["length"] != length or not 0 <= start <= end <= min(self._size_bytes, len(self._memory.buf)):
            raise ClientError(f"the server handed out a slot that does not fit: {slot}, want {length} bytes")
        return slice(start, end)

    def write(self, slot, data):
        self._memory.buf[self._range(slot, len(data))] = data

    def read(self, slot, length):
        return bytes(self._memory.buf[self._range(slot, length)])


class Steps:
    """Prints a line with its time for each step."""

    def __init__(self):
        self._last = time.perf_counter()

    def done(self, text):
        now = time.perf_counter()
        print(f"{(now - self._last) * 1e3:9.2f} ms  {text}", flush=True)
        self._last = time.perf_counter()


def key(tokens, end, request_id, rank):
    """What a request is about: tokens [0, end) of a prompt. A lookup is for all ranks: rank None."""
    return {
        "model_name": MODEL,
        "world_size": WORLD_SIZE,
        "worker_id": rank,
        "token_ids": tokens,
        "start": 0,
        "end": end,
        "request_id": request_id,
        "cache_salt": "",
        "request_configs": None,
        "num_kv_readers": 1,
    }


def wait_for_lookup(connection, request_id):
    """The number of chunks found, once the server knows it."""
    until = time.monotonic() + connection.timeout_seconds
    while time.monotonic() < until:
        found = connection.call(Operation.QUERY_PREFETCH_STATUS, request_id)
        if found is not None:
            return found
        time.sleep(0.002)
    raise ClientError(f"the lookup did not end within {connection.timeout_seconds:g} s")


def expect(what, got, wanted):
    if got != wanted:
        raise ClientError(f"{what}: got {got!r}, expected {wanted!r}")


def round_trip(connection, pool, instance_id, chunk_size, arguments, steps):
    """Stores, looks up and reads back; returns the number of bytes that were equal."""
    # A chunk is float16 [keys and values, layer, token, hidden]; a prompt nobody has stored before.
    chunk_bytes = 2 * arguments.layers * chunk_size * arguments.hidden * BYTES_PER_FLOAT16
    end = arguments.chunks * chunk_size
    tokens = [random.randrange(150_000) for _ in range(end)]
    chunks = [random.randbytes(chunk_bytes) for _ in range(arguments.chunks)]
    writer, reader, scheduler = (f"example-{uuid.uuid4().hex}" for _ in range(3))
    steps.done(f"made {arguments.chunks} chunks of {chunk_bytes} bytes for a prompt of {end} tokens")

    try:
        stored = key(tokens, end, writer, RANK)
        context = connection.call(Operation.PREPARE_STORE, stored, instance_id)["context"]
        # The tokens are new to the server, so it asks for every chunk unless its pool has no room for them.
        if len(context["slots"]) != arguments.chunks or context["chunk_indices"] != list(range(arguments.chunks)):
            raise ClientError(
                f"the server gave {len(context['slots'])} slots for {arguments.chunks} chunks of {chunk_bytes} bytes: "
                "is its pool (--l1-size-gb) too small?"
            )
        steps.done(f"prepare_store: {len(context['slots'])} slots")
        for slot, index in zip(context["slots"], context["chunk_indices"], strict=True):
            pool.write(slot, chunks[index])
        steps.done("wrote the slots")
        expect("commit_store", connection.call(Operation.COMMIT_STORE, stored, instance_id, b""), True)
        steps.done("commit_store")

        connection.call(Operation.LOOKUP, key(tokens, end, reader, None), WORLD_SIZE)
        expect("chunks found", wait_for_lookup(connection, reader), arguments.chunks)
        steps.done(f"lookup, query_prefetch_status: {arguments.chunks} chunks found")
        wanted = key(tokens, end, reader, RANK)
        reply = connection.call(Operation.PREPARE_RETRIEVE, wanted, instance_id)
        expect("prepare_retrieve: success", reply["success"], True)
        slots = reply["context"]["slots"]
        expect("prepare_retrieve: slots", len(slots), arguments.chunks)
        steps.done(f"prepare_retrieve: {len(slots)} slots")
        read = [pool.read(slot, chunk_bytes) for slot in slots]
        steps.done("read the slots")
        expect("commit_retrieve", connection.call(Operation.COMMIT_RETRIEVE, wanted, instance_id), True)
        steps.done("commit_retrieve")

        # What a scheduler does with a hit that it will not use: it gives the locks back.
        looked_up = key(tokens, end, scheduler, None)
        connection.call(Operation.LOOKUP, looked_up, WORLD_SIZE)
        # The last argument is how long the server may wait; we wait for its answer a little longer.
        found = connection.call(
            Operation.WAIT_PREFETCH_STATUS,
            scheduler,
            connection.timeout_seconds,
            timeout_seconds=connection.timeout_seconds + 1,
        )
        expect("chunks found", found, arguments.chunks)
        connection.call(Operation.FREE_LOOKUP_LOCKS, looked_up, WORLD_SIZE)
        steps.done("lookup, wait_prefetch_status, free_lookup_locks")
    finally:
        if connection.answers:
            for request_id in (writer, reader, scheduler):
                connection.call(Operation.END_SESSION, request_id)
    steps.done("end_session")

    for index, (got, stored_bytes) in enumerate(zip(read, chunks, strict=True)):
        if got != stored_bytes:
            raise ClientError(f"chunk {index} came back with other bytes")
    return sum(map(len, read))


def run(arguments):
    steps = Steps()
    connection = Connection(arguments.url, arguments.timeout)
    try:
        try:
            expect("noop", connection.call(Operation.NOOP, timeout_seconds=min(arguments.timeout, 5)), "OK")
        except NoAnswerError:
            raise ClientError(f"no server at {arguments.url}: start one with examples/run.sh") from None
        chunk_size = connection.call(Operation.GET_CHUNK_SIZE)
        steps.done(f"connected to {arguments.url}: chunks of {chunk_size} tokens")

        instance_id = random.getrandbits(48)
        registration = {
            "instance_id": instance_id,
            "model_name": MODEL,
            "world_size": WORLD_SIZE,
            "block_size": chunk_size,
            "num_layers": arguments.layers,
            "hidden_dim_size": arguments.hidden,
            "dtype_str": "float16",
            "use_mla": False,
            "num_physical_slots": chunk_size,
        }
        shared = connection.call(Operation.REGISTER_KV_CACHE_ENGINE_DRIVEN_CONTEXT, registration)
        try:
            if not shared["shm_name"]:
                raise ClientError(
                    "the server shares no memory, and this client moves KV bytes only through shared memory: "
                    "start the server with --shm-name NAME, or use client_lmcache.py"
                )
            steps.done(f"registered: pool {shared['shm_name']} of {shared['pool_size']} bytes")
            with Pool(shared["shm_name"], shared["pool_size"]) as pool:
                steps.done("mapped the pool")
                equal = round_trip(connection, pool, instance_id, chunk_size, arguments, steps)
        finally:
            if connection.answers:
                connection.call(Operation.UNREGISTER_KV_CACHE_ENGINE_DRIVEN_CONTEXT, instance_id)
        steps.done("unregistered")
        return equal
    finally:
        connection.close()


def positive(kind):
    def parse(text):
        value = kind(text)
        if not 0 < value < 1e6:
            raise ValueError(text)
        return value

    parse.__name__ = f"positive {kind.__name__}"
    return parse


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="tcp://127.0.0.1:5555", help="the server (default: %(default)s)")
    parser.add_argument("--chunks", type=positive(int), default=4, help="chunks to store (default: %(default)s)")
    parser.add_argument("--layers", type=positive(int), default=4, help="layers of the model (default: %(default)s)")
    parser.add_argument("--hidden", type=positive(int), default=64, help="KV width of a layer (default: %(default)s)")
    parser.add_argument(
        "--timeout", type=positive(float), default=10.0, help="seconds that an answer may take (default: %(default)s)"
    )
    try:
        equal = run(parser.parse_args())
    except ClientError as error:
        print(f"client: {error}", file=sys.stderr)
        return 1
    print(f"OK: {equal} bytes equal")
    return 0


if __name__ == "__main__":
    sys.exit(main())
