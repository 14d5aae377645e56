#!/usr/bin/env python3
"""Makes the two traces beside it with the recorders of an installed LMCache 0.5.6.

    python3 tests/golden/simulate/from_lmcache.py
"""

import pathlib
import shutil
import tempfile
import time

import torch
from lmcache.v1.distributed.api import (
    GroupedObjectKeys,
    MemoryLayoutDesc,
    ObjectKey,
    PrefetchTaskSpec,
)
from lmcache.v1.mp_observability.config import LookupHashLogConfig
from lmcache.v1.mp_observability.event import Event, EventType
from lmcache.v1.mp_observability.subscribers.logging.lookup_hash import (
    LookupHashLoggingSubscriber,
)
from lmcache.v1.mp_observability.trace.recorder import StorageTraceRecorder

HERE = pathlib.Path(__file__).parent
MANAGER = "lmcache.v1.distributed.storage_manager.StorageManager."
LAYOUT = MemoryLayoutDesc(shapes=[torch.Size([2, 4, 16, 8])], dtypes=[torch.bfloat16])


def key(chunk, rank):
    return ObjectKey(chunk.to_bytes(32, "big"), "m/7b", rank)


def storage():
    """Two ranks; chunks 0 to 3 are looked up, stored, and looked up again with one more."""
    recorder = StorageTraceRecorder(str(HERE / "storage.trace"))

    def call(name, args):
        now = time.monotonic()
        metadata = {"qualname": MANAGER + name, "args": args, "t_mono": now}
        recorder._on_trace_call(Event(EventType.TRACE_CALL, time.time(), metadata))

    def lookup(chunks):
        groups = [
            GroupedObjectKeys([key(c, rank) for c in chunks], 0, LAYOUT) for rank in (1, 2)
        ]
        spec = PrefetchTaskSpec(key_groups=groups)
        call("submit_prefetch_task", {"spec": spec, "external_request_id": "r", "skip_l2": False})

    lookup(range(4))
    for rank in (1, 2):
        keys = [key(c, rank) for c in range(4)]
        call("reserve_write", {"keys": keys, "layout_desc": LAYOUT})
        call("finish_write", {"keys": keys})
    call("reserve_write", {"keys": [key(9, 1), key(9, 2)], "layout_desc": LAYOUT})
    lookup(range(5))
    lookup([9])
    recorder.close()


def lookups():
    with tempfile.TemporaryDirectory() as directory:
        config = LookupHashLogConfig(output_dir=directory)
        log = LookupHashLoggingSubscriber(config)
        for at, model, chunks, tokens in [
            (3.0, "m/7b", [1, 2, 3], 800), (1.0, "m/7b", [1, 2], 520), (2.0, "other", [1], 300),
        ]:
            log._on_lookup_hashes(Event(EventType.MP_LOOKUP, at, {
                "request_id": "r", "model_name": model, "chunk_size": 256, "seq_len": tokens,
                "dtypes": ["bfloat16"], "shapes": [[2, 32, 256, 8]],
                "chunk_hashes": [c.to_bytes(32, "big") for c in chunks],
            }))
        log.shutdown()
        (made,) = pathlib.Path(directory).glob("*.jsonl")
        shutil.copy(made, HERE / "lookup_hashes.jsonl")


storage()
lookups()
