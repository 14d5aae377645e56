#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The round trip of client.py with the classes that LMCache's engine integrations use.

Needs lmcache==0.5.6 (which brings torch), no GPU: the KV cache is a set of CPU tensors. Bytes go
through shared memory where the server has it on, else inside the messages; LMCache decides that.
"""

import argparse
import os
import random
import sys
import time
import uuid

# Before lmcache is imported, which reads them then.
os.environ.setdefault("LMCACHE_LOG_LEVEL", "ERROR")
os.environ.setdefault("LMCACHE_TRACK_USAGE", "false")

try:
    import torch
    import zmq
    from lmcache.v1.multiprocess.custom_types import IPCCacheServerKey
    from lmcache.v1.multiprocess.transfer_context.worker_transfer import create_transfer_context
    from lmcache.v1.multiprocess.transport.factory import RequestClientFactory
except ImportError as error:
    sys.exit(f"client_lmcache: {error}; install it with: pip install lmcache==0.5.6 (client.py does without)")

MODEL = "example-model-lmcache"
WORLD_SIZE = 1
RANK = 0
BLOCK_TOKENS = 16
HEADS, HEAD_SIZE = 2, 32


class ClientError(Exception):
    """Ends the program with one sentence."""


class Answers:
    """Waits for a request's answer; once one stayed away there is nothing left to tidy up."""

    def __init__(self, timeout_seconds):
        self.timeout_seconds = timeout_seconds
        self.lost = False

    def __call__(self, future, seconds=None):
        try:
            return future.result(timeout=self.timeout_seconds if seconds is None else seconds)
        except TimeoutError:
            self.lost = True
            raise


def expect(what, got, wanted):
    if got != wanted:
        raise ClientError(f"{what}: got {got!r}, expected {wanted!r}")


def key(tokens, end, request_id, rank):
    return IPCCacheServerKey(
        model_name=MODEL,
        world_size=WORLD_SIZE,
        worker_id=rank,
        token_ids=tuple(tokens),
        start=0,
        end=end,
        request_id=request_id,
        num_kv_readers=1,
    )


def paged_kv(layers, blocks):
    """A paged KV cache as vLLM has it: one tensor [keys and values, block, head, token, head size] per layer."""
    shape = (2, blocks, HEADS, BLOCK_TOKENS, HEAD_SIZE)
    return {f"layer.{index}": torch.randn(shape).to(torch.float16) for index in range(layers)}


def wait_for_lookup(client, request_id, answer):
    """The server may wait as long as we would; its answer then takes a little longer."""
    return answer(client.wait_prefetch_status(request_id, answer.timeout_seconds), answer.timeout_seconds + 1)


def run(arguments):
    answer = Answers(arguments.timeout)
    last = time.perf_counter()

    def done(text):
        nonlocal last
        now = time.perf_counter()
        print(f"{(now - last) * 1e3:9.2f} ms  {text}", flush=True)
        last = time.perf_counter()

    # A context of our own, closed with the process: the client may not close it under its own thread.
    context = zmq.Context()
    client = RequestClientFactory.create(arguments.url, context=context)
    try:
        try:
            expect("noop", answer(client.noop(), min(arguments.timeout, 5)), "OK")
        except TimeoutError:
            raise ClientError(f"no server at {arguments.url}: start one with examples/run.sh") from None
        chunk_size = answer(client.get_chunk_size())
        if chunk_size % BLOCK_TOKENS:
            raise ClientError(f"the server's chunk size {chunk_size} is not a multiple of {BLOCK_TOKENS}")
        done(f"connected to {arguments.url}: chunks of {chunk_size} tokens")

        end = arguments.chunks * chunk_size
        blocks_per_chunk = chunk_size // BLOCK_TOKENS
        blocks = arguments.chunks * blocks_per_chunk
        tokens = [random.randrange(150_000) for _ in range(end)]
        cache = paged_kv(arguments.layers, blocks)
        stored = {name: layer.clone() for name, layer in cache.items()}
        done(f"made a KV cache of {blocks} blocks for a prompt of {end} tokens")

        transfer = create_transfer_context(
            cache, instance_id=random.getrandbits(48), req_client=client, mode="engine_driven"
        )
        try:
            transfer.register(cache, MODEL, WORLD_SIZE, blocks_per_chunk, arguments.timeout)
            done(f"registered: {type(transfer.engine_driven_context).__name__}")
            equal = round_trip(client, transfer, cache, stored, tokens, end, arguments.chunks, answer, done)
        finally:
            unregistered = None if answer.lost else transfer.unregister()
            if unregistered is not None:
                answer(unregistered)
            transfer.close()
        done("unregistered")
        return equal
    finally:
        client.close()


def round_trip(client, transfer, cache, stored, tokens, end, chunks, answer, done):
    writer, reader, scheduler = (f"example-{uuid.uuid4().hex}" for _ in range(3))
    block_ids = [list(range(end // BLOCK_TOKENS))]
    blocks_per_chunk = len(block_ids[0]) // chunks
    try:
        store = transfer.submit_store(writer, key(tokens, end, writer, RANK), cache, block_ids, None, blocks_per_chunk)
        expect("store", bool(answer(store)), True)
        done("stored (prepare_store, gather, commit_store)")

        answer(client.lookup(key(tokens, end, reader, None), WORLD_SIZE))
        expect("chunks found", wait_for_lookup(client, reader, answer), chunks)
        done(f"lookup, wait_prefetch_status: {chunks} chunks found")

        for layer in cache.values():
            layer.zero_()
        wanted = key(tokens, end, reader, RANK)
        retrieve = transfer.submit_retrieve(reader, wanted, cache, block_ids, None, blocks_per_chunk)
        expect("retrieve", bool(answer(retrieve)), True)
        done("retrieved (prepare_retrieve, scatter, commit_retrieve)")

        # What a scheduler does with a hit that it will not use: it gives the locks back.
        looked_up = key(tokens, end, scheduler, None)
        answer(client.lookup(looked_up, WORLD_SIZE))
        expect("chunks found", wait_for_lookup(client, scheduler, answer), chunks)
        answer(client.free_lookup_locks(looked_up, WORLD_SIZE))
        done("lookup, wait_prefetch_status, free_lookup_locks")
    finally:
        if not answer.lost:
            for request_id in (writer, reader, scheduler):
                answer(client.end_session(request_id))
    done("end_session")

    for name, layer in cache.items():
        if not torch.equal(layer.view(torch.int16), stored[name].view(torch.int16)):
            raise ClientError(f"{name} came back with other bytes")
    return sum(layer.nbytes for layer in cache.values())


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
    parser.add_argument(
        "--timeout", type=positive(float), default=10.0, help="seconds that an answer may take (default: %(default)s)"
    )
    try:
        equal = run(parser.parse_args())
    except (ClientError, TimeoutError, ValueError) as error:
        print(f"client_lmcache: {error}", file=sys.stderr)
        return 1
    print(f"OK: {equal} bytes equal")
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    # ZMQ's context may wait for ever for a monitor socket that LMCache 0.5.6's client leaves open.
    os._exit(status)
