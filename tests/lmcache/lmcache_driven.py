#!/usr/bin/env python3
"""The lmcache-driven path on CPU, with LMCache 0.5.6's own client, in every layout there is.

    lmcache_driven.py --server STOCKADE [--lmcache PATH/TO/bin/lmcache] [--inline]

For each layout of a paged KV cache, random blocks are stored with `mode="lmcache_driven"` and
retrieved into other blocks: by the same path, with tokens skipped, and, where engines can copy such
a layout themselves, by an engine-driven worker; and the other way round. With --lmcache, LMCache's
own server runs the same, and every byte of every tensor must be equal afterwards. `--inline` gives
neither server a segment, so that engine-driven chunks travel as pickles.
"""

import argparse
import hashlib
import itertools
import os
import random
import socket
import subprocess
import sys
import tempfile
import time

os.environ.setdefault("LMCACHE_LOG_LEVEL", "CRITICAL")
os.environ.setdefault("LMCACHE_TRACK_USAGE", "false")
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch  # noqa: E402
import zmq  # noqa: E402
from lmcache.utils import EngineType  # noqa: E402
from lmcache.v1.multiprocess.custom_types import IPCCacheServerKey  # noqa: E402
from lmcache.v1.multiprocess.group_view import EngineGroupInfo  # noqa: E402
from lmcache.v1.multiprocess.transfer_context.worker_transfer import (  # noqa: E402
    create_transfer_context,
)
from lmcache.v1.multiprocess.transport.factory import RequestClientFactory  # noqa: E402

CHUNK, BLOCK, BLOCKS, LAYERS, HEADS, WIDTH = 64, 16, 40, 3, 2, 8
PATIENCE = 20.0
instance_ids = itertools.count(70_000)


class Layout:
    """Tensors of an engine by layer, and what it says of them."""

    def __init__(self, name, shape, hints=None, engine=EngineType.VLLM, dtype=torch.bfloat16,
                 layers=LAYERS, groups=(), engine_driven=True, make=None, block=BLOCK):
        self.name, self.shape, self.hints, self.engine = name, shape, hints, engine
        self.dtype, self.layers, self.groups, self.make = dtype, layers, list(groups), make
        self.engine_driven, self.block = engine_driven, block

    def tensors(self, seed):
        """Random bytes, the same for each seed."""
        generator = torch.Generator().manual_seed(seed)

        def filled(shape, dtype=self.dtype):
            size = torch.Size(shape).numel() * dtype.itemsize
            raw = torch.randint(0, 120, (size,), generator=generator, dtype=torch.uint8)
            return raw.view(dtype).view(shape)

        if self.make:
            return self.make(filled)
        return {f"layer.{n}": filled(self.shape) for n in range(self.layers)}


def permuted(filled):
    """Heads outside in memory, tokens outside by name: what vLLM shows of an HND cache."""
    shape = (2, BLOCKS, HEADS, BLOCK, WIDTH)
    return {f"layer.{n}": filled(shape).permute(0, 1, 3, 2, 4) for n in range(LAYERS)}


def siblings(filled):
    """All layers in one storage."""
    pool = filled((LAYERS, 2, BLOCKS, HEADS, BLOCK, WIDTH))
    return {f"layer.{n}": pool[n] for n in range(LAYERS)}


def mixed(filled):
    """Layers of two shapes."""
    wide, narrow = (2, BLOCKS, HEADS, BLOCK, WIDTH), (2, BLOCKS, HEADS, BLOCK, WIDTH // 2)
    return {f"layer.{n}": filled(narrow if n == 1 else wide) for n in range(LAYERS)}


NHD, HND = {"kv_layout": "NHD"}, {"kv_layout": "HND"}
LAYOUTS = [
    Layout("vllm, heads outside by default", (2, BLOCKS, HEADS, BLOCK, WIDTH)),
    Layout("vllm HND", (2, BLOCKS, HEADS, BLOCK, WIDTH), HND, dtype=torch.float32),
    Layout("vllm NHD", (2, BLOCKS, BLOCK, HEADS, WIDTH), NHD),
    Layout("vllm one head", (2, BLOCKS, 1, BLOCK, WIDTH), HND),
    Layout("vllm blocks first HND", (BLOCKS, 2, HEADS, BLOCK, WIDTH), HND),
    Layout("vllm blocks first NHD", (BLOCKS, 2, BLOCK, HEADS, WIDTH), NHD),
    Layout("vllm fused HND", (BLOCKS, HEADS, BLOCK, 2 * WIDTH), HND),
    Layout("vllm fused NHD", (BLOCKS, BLOCK, HEADS, 2 * WIDTH), NHD),
    Layout("vllm MLA", (BLOCKS, BLOCK, 24)),
    Layout("vllm MLA of 8 bits", (BLOCKS, BLOCK, 24), dtype=torch.uint8),
    Layout("vllm indexer", (BLOCKS, BLOCK, 132), dtype=torch.uint8),
    Layout("vllm permuted", None, HND, make=permuted, engine_driven=False),
    Layout("vllm in one storage", None, HND, make=siblings),
    Layout("vllm two shapes", None, HND, make=mixed, engine_driven=False, groups=[
        EngineGroupInfo(0, (0, 2), BLOCK), EngineGroupInfo(0, (1,), BLOCK)]),
    Layout("vllm two engine groups", (2, BLOCKS, HEADS, BLOCK, WIDTH), HND, engine_driven=False,
           groups=[EngineGroupInfo(0, (0, 2), BLOCK), EngineGroupInfo(1, (1,), BLOCK)]),
    Layout("vllm sliding window", (2, BLOCKS, HEADS, BLOCK, WIDTH), HND, engine_driven=False,
           groups=[EngineGroupInfo(0, (0, 2), BLOCK), EngineGroupInfo(1, (1,), BLOCK, 2 * BLOCK)]),
    Layout("vllm compressed blocks", (BLOCKS, BLOCK // 2, 24), engine_driven=False,
           groups=[EngineGroupInfo(0, (0, 1, 2), BLOCK)]),
    Layout("vllm layer that shares blocks", (2, BLOCKS, HEADS, BLOCK, WIDTH), HND,
           engine_driven=False, groups=[EngineGroupInfo(0, (0, 2), BLOCK)]),
    Layout("atom", (BLOCKS, BLOCK, 24), engine=EngineType.ATOM),
    Layout("sglang keys and values", (BLOCKS * BLOCK, HEADS, WIDTH),
           {"kv_list_layout": "k_v", "tokens_per_block": BLOCK}, EngineType.SGLANG, layers=4),
    Layout("sglang MLA", (BLOCKS * BLOCK, 1, 24), {"tokens_per_block": BLOCK}, EngineType.SGLANG),
    Layout("sglang unified MLA", (BLOCKS, BLOCK, 24), {"kv_list_layout": "unified"},
           EngineType.SGLANG),
    Layout("sglang unified components", (BLOCKS, BLOCK, HEADS, WIDTH),
           {"kv_list_layout": "unified"}, EngineType.SGLANG, layers=4),
    Layout("trtllm", (BLOCKS, LAYERS, 2, HEADS * BLOCK * WIDTH),
           {"num_kv_heads": HEADS, "tokens_per_block": BLOCK, "head_dim": WIDTH},
           EngineType.TRTLLM, layers=1),
]
REFUSED = [
    Layout("seven dimensions", (2, BLOCKS, 1, HEADS, 1, BLOCK, WIDTH)),
    Layout("blocks that are no part of a chunk", (2, BLOCKS, HEADS, 24, WIDTH), HND),
    Layout("sglang without its tokens", (BLOCKS * BLOCK, 1, 24), {}, EngineType.SGLANG),
    Layout("trtllm of other sizes", (BLOCKS, LAYERS, 2, 100),
           {"num_kv_heads": HEADS, "tokens_per_block": BLOCK, "head_dim": WIDTH},
           EngineType.TRTLLM, layers=1),
    Layout("a group of layers that do not exist", (2, BLOCKS, HEADS, BLOCK, WIDTH), HND,
           groups=[EngineGroupInfo(0, (0, 7), BLOCK)]),
    Layout("groups that are not those of the shapes", (2, BLOCKS, HEADS, BLOCK, WIDTH), HND,
           groups=[EngineGroupInfo(0, (0,), BLOCK), EngineGroupInfo(0, (1, 2), BLOCK)]),
]


class Client:
    def __init__(self, url):
        self.requests = RequestClientFactory.create(url, context=zmq.Context())

    def worker(self, layout, model, seed, mode):
        return Worker(self.requests, layout, model, seed, mode)

    def lookup(self, model, tokens, wanted=3):
        """LMCache commits a store after it has answered it, so that it may take some lookups."""
        deadline = time.monotonic() + 3
        while True:
            request, hit = self.lookup_once(model, tokens)
            if hit >= wanted or time.monotonic() > deadline:
                return request, hit
            self.requests.end_session(request).result(timeout=PATIENCE)
            time.sleep(0.02)

    def lookup_once(self, model, tokens):
        request = f"r-{random.random()}"
        end = len(tokens) // CHUNK * CHUNK
        self.requests.lookup(key(model, tokens, 0, end, request, None), 1).result(timeout=PATIENCE)
        deadline = time.monotonic() + PATIENCE
        while (hit := self.requests.query_prefetch_status(request).result(timeout=PATIENCE)) is None:
            assert time.monotonic() < deadline, "the lookup has no result"
            time.sleep(0.005)
        return request, hit


def key(model, tokens, start, end, request, rank=0):
    return IPCCacheServerKey(
        model_name=model, world_size=1, worker_id=rank, token_ids=tuple(tokens), start=start,
        end=end, request_id=request, cache_salt="", request_configs=None, num_kv_readers=1)


class Worker:
    def __init__(self, requests, layout, model, seed, mode):
        self.layout, self.model, self.kv = layout, model, layout.tensors(seed)
        self.context = create_transfer_context(
            self.kv, instance_id=next(instance_ids), req_client=requests, mode=mode)
        groups = layout.groups if mode == "lmcache_driven" else ()
        self.context.register(
            self.kv, model, 1, CHUNK // BLOCK, PATIENCE, layout_hints=layout.hints,
            engine_group_infos=groups, engine_type=layout.engine)

    def blocks(self, block_ids):
        return [list(block_ids) for _ in (self.layout.groups or [None])]

    def store(self, tokens, block_ids):
        end = len(tokens) // CHUNK * CHUNK
        event = self.context.create_recorded_event()
        return self.context.submit_store(
            "r", key(self.model, tokens, 0, end, f"s-{random.random()}"), self.kv,
            self.blocks(block_ids), event, CHUNK // BLOCK).result(timeout=PATIENCE)

    def retrieve(self, request, tokens, block_ids, hit, skip=0):
        event = self.context.create_recorded_event()
        done = self.context.submit_retrieve(
            request, key(self.model, tokens, 0, hit * CHUNK, request), self.kv,
            self.blocks(block_ids), event, CHUNK // BLOCK,
            skip_first_n_tokens=skip).result(timeout=PATIENCE)
        return done

    def digest(self):
        digest = hashlib.sha256()
        for tensor in self.kv.values():
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def close(self):
        self.context.unregister().result(timeout=PATIENCE)
        self.context.close()


def tokens_of(layout, salt):
    generator = random.Random(f"{layout.name} {salt}")
    return [generator.randrange(150_000) for _ in range(3 * CHUNK)]


def run(client, layout):
    """What came of each step, by name."""
    outcome = {}
    source = random.Random(1).sample(range(1, 21), 12)
    target = random.Random(2).sample(range(21, BLOCKS), 12)
    ways = ["lmcache_driven"] + (["engine_driven"] if layout.engine_driven else [])
    for index, (writes, reads) in enumerate(itertools.product(ways, ways)):
        if (writes, reads) == ("engine_driven", "engine_driven"):
            continue
        model = f"{layout.name} {index}".replace(" ", "-")
        tokens = tokens_of(layout, index)
        writer = client.worker(layout, model, 1, writes)
        before = writer.digest()
        outcome[f"{writes} stores"] = writer.store(tokens, source)
        assert writer.digest() == before, "a store changed the engine's memory"
        for skip in (0, 16, 40, 3 * CHUNK - 16):
            request, hit = client.lookup(model, tokens)
            reader = client.worker(layout, model, 2, reads)
            done = reader.retrieve(request, tokens, target, hit, skip)
            name = f"{writes} to {reads}, {skip} skipped"
            outcome[name] = (hit, done, reader.digest())
            client.requests.end_session(request).result(timeout=PATIENCE)
            reader.close()
        writer.close()
    # Chunks of nothing but the null block are not stored.
    if layout.groups or layout.engine == EngineType.VLLM:
        model, tokens = f"{layout.name} null".replace(" ", "-"), tokens_of(layout, "null")
        worker = client.worker(layout, model, 1, "lmcache_driven")
        outcome["null blocks"] = worker.store(tokens, source[:4] + [0] * 4 + source[4:8])
        outcome["found before null blocks"] = client.lookup(model, tokens, 1)[1]
        for name, block_ids in (("too few blocks", source[:11]), ("a block too far", [99] * 12)):
            outcome[name] = worker.store(tokens_of(layout, name), block_ids)
        worker.close()
    return outcome


def refusal(client, layout):
    """The server's own word, instead of a client that waits."""
    worker = None
    try:
        worker = client.worker(layout, "refused", 1, "lmcache_driven")
    except Exception as error:
        return str(error)
    worker.close()
    return None


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Server:
    def __init__(self, command, inline):
        self.port, http = free_port(), free_port()
        name = "" if inline else f"driven-{self.port}"
        self.log = tempfile.NamedTemporaryFile("w+", suffix=".log")
        self.child = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(self.port), "--http-port", str(http),
             "--l1-size-gb", "0.25", "--chunk-size", str(CHUNK), "--eviction-policy", "LRU",
             "--supported-transfer-mode", "auto", "--shm-name", name],
            stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log)
        deadline = time.monotonic() + 120
        while True:
            assert self.child.poll() is None and time.monotonic() < deadline, "no server"
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    break
            time.sleep(0.1)
        self.client = Client(f"tcp://127.0.0.1:{self.port}")

    def stop(self):
        self.child.terminate()
        try:
            self.child.wait(20)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--server", required=True)
    parser.add_argument("--lmcache")
    parser.add_argument("--inline", action="store_true")
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    ours = theirs = None
    failures = 0
    try:
        ours = Server([options.server, "serve"], options.inline)
        if options.lmcache:
            theirs = Server([options.lmcache, "server", "--no-l1-use-lazy"], options.inline)
        for layout in LAYOUTS:
            if options.only not in layout.name:
                continue
            got, wanted = run(ours.client, layout), {}
            beyond = []
            try:
                wanted = run(theirs.client, layout) if theirs else {}
            except TimeoutError:
                beyond = ["LMCache's server does not answer its registration"]
            beyond += [f"LMCache's server does not do: {step}" for step, result in wanted.items()
                       if isinstance(result, tuple) and not result[1]]
            wrong = [f"{step}: {got[step]}, LMCache {result}" for step, result in wanted.items()
                     if got[step] != result and not (isinstance(result, tuple) and not result[1])]
            wrong += [f"{step}: {result}" for step, result in got.items()
                      if isinstance(result, tuple) and result[:2] != (3, True)]
            failures += bool(wrong)
            print("FAIL" if wrong else "ok  ", layout.name, f"({len(got)} steps)")
            for line in wrong + beyond:
                print("        ", line)
        for layout in REFUSED:
            if options.only not in layout.name:
                continue
            sentence = refusal(ours.client, layout)
            is_wrong = sentence is None or "error: " not in sentence
            failures += is_wrong
            print("FAIL" if is_wrong else "ok  ", f"{layout.name} is refused: {sentence}")
    finally:
        for server in (ours, theirs):
            if server:
                server.stop()
        for name in os.listdir("/dev/shm"):
            # LMCache's client unlinks its segments at an orderly exit, which the end is not.
            if name.startswith(f"lmcache_kv_{os.getpid()}_"):
                os.unlink(f"/dev/shm/{name}")
    print(f"{failures} failed" if failures else "all equal" if theirs else "all well")
    sys.stdout.flush()
    os._exit(bool(failures))  # Client threads would otherwise wait for closed servers.


main()
