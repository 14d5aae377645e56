#!/usr/bin/env python3
"""Makes payloads.jsonl and replies.jsonl with the codecs of an installed LMCache 0.5.6.

    python3 host/wire/tests/golden/from_lmcache.py

payloads.jsonl: payload frames for an operation, and whether LMCache's server decodes them or
drops them in silence. replies.jsonl: results and the bytes LMCache sends for them.
recorded.jsonl, beside them, was recorded between LMCache's own client and server.
"""

import dataclasses
import enum
import json
import pathlib
import struct

import msgspec
from lmcache.v1.distributed.transfer_channel.api import TransferChannelAddress
from lmcache.v1.multiprocess import custom_types as types
from lmcache.v1.multiprocess.group_view import EngineGroupInfo
from lmcache.v1.multiprocess.protocols.server_module import ServerModuleCallResponse
from lmcache.v1.multiprocess.rpc import get_rpc_specs
from lmcache.v1.multiprocess.transport.zmq_impl.mq import (
    msgspec_encode,
    unwrap_request_payloads,
)

HERE = pathlib.Path(__file__).parent
pack = msgspec.msgpack.encode
SPECS = get_rpc_specs()
KEY = {
    "model_name": "m", "world_size": 1, "worker_id": None, "token_ids": [1, 200, 60000, 128000],
    "start": 0, "end": 4, "request_id": "r", "cache_salt": "", "request_configs": None,
    "num_kv_readers": 1,
}
REGISTER = {
    "instance_id": 12, "model_name": "m", "world_size": 1, "block_size": 16, "num_layers": 2,
    "hidden_dim_size": 8, "dtype_str": "float16", "use_mla": False, "num_physical_slots": 16,
}
TENSOR = {
    "type": "cpu_shm", "shm_name": "/lmcache_kv_1_0", "nbytes": 65536, "version": 1,
    "metadata": {"dtype": "bfloat16", "shape": [2, 4, 2, 16, 8], "stride": [1024, 256, 128, 8, 1],
                 "storage_offset": 0, "device_uuid": "cpu"},
}
RECORD = {"req_id": "r", "new_block_ids": [1, 2], "new_token_ids": [3]}
MISSING = object()


def entries(base, **changes):
    """A map written entry by entry, so that entries may be raw bytes, missing or twice."""
    merged = {**base, **changes}
    kept = [(name, value) for name, value in merged.items() if value is not MISSING]
    return bytes([0x80 | len(kept)]) + b"".join(
        pack(name) + (value if isinstance(value, bytes) else pack(value)) for name, value in kept
    )


def key(**changes):
    return entries(KEY, **changes)


def map_of(*pairs):
    return bytes([0x80 | len(pairs)]) + b"".join(pairs)


def array_of(*items):
    return bytes([0x90 | len(items)]) + b"".join(items)


def cases():
    one, ident = pack(1), pack(12)

    def lookup(name, key_frame, tp_size=one):
        return f"LOOKUP {name}", "lookup", [key_frame, tp_size]

    yield lookup("baseline", key())
    yield lookup("key as array (positional)", pack(list(KEY.values())))
    yield lookup("trailing byte after key", key() + b"\xc0")
    doubled = b"\x8b" + key()[1:] + pack("request_id") + pack("r2")
    yield lookup("duplicate map key (last wins?)", doubled)
    yield lookup("tp_size as string '1'", key(), pack("1"))
    yield lookup("tp_size as float 1.5", key(), pack(1.5))
    yield lookup("tp_size nil", key(), pack(None))
    yield lookup("tp_size as true", key(), pack(True))
    yield lookup("tp_size 2**64-1", key(), pack(2**64 - 1))
    yield lookup("start as float 0.0", key(start=0.0))
    yield lookup("end as float 512.0", key(end=512.0))
    yield lookup("start as true", key(start=True))
    yield lookup("start as string", key(start="0"))
    yield lookup("world_size as float 1.0", key(world_size=1.0))
    yield lookup("worker_id as float 0.0", key(worker_id=0.0))
    yield lookup("worker_id given (0) on lookup", key(worker_id=0))
    yield lookup("request_id as bin", key(request_id=pack(b"r")))
    yield lookup("model_name as bin", key(model_name=pack(b"m")))
    yield lookup("request_id empty", key(request_id=""))
    yield lookup("cache_salt nil", key(cache_salt=None))
    yield lookup("request_configs nil", key(request_configs=None))
    yield lookup("request_configs as list", key(request_configs=[1]))
    yield lookup("request_configs with int keys", key(request_configs={1: 2}))
    ext = map_of(pack("a") + b"\xd4\x05\x00")
    yield lookup("request_configs with ext value", key(request_configs=ext))
    timestamp = map_of(pack("a") + b"\xd6\xff\x00\x00\x00\x01")
    yield lookup("request_configs with timestamp ext", key(request_configs=timestamp))
    tokens = KEY["token_ids"]
    array32 = b"\xdd" + struct.pack(">I", 4) + b"".join(map(pack, tokens))
    yield lookup("token_ids array32 header", key(token_ids=array32))
    wide = array_of(*(b"\xcf" + struct.pack(">Q", t) for t in tokens))
    yield lookup("token_ids every int as uint64 (cf)", key(token_ids=wide))
    signed = array_of(*(b"\xd3" + struct.pack(">q", t) for t in tokens))
    yield lookup("token_ids every int as int64 (d3)", key(token_ids=signed))
    yield lookup("token_ids as float64 integral", key(token_ids=[1.0]))
    yield lookup("token_ids as bin", key(token_ids=pack(b"\x01")))
    yield lookup("token_ids as string", key(token_ids="1"))
    yield lookup("token_ids with bools", key(token_ids=[True]))
    yield lookup("num_kv_readers as float 1.0", key(num_kv_readers=1.0))
    yield lookup("num_kv_readers nil", key(num_kv_readers=None))
    yield lookup("invalid utf-8 in request_id", key(request_id=b"\xa1\xff"))
    # Beyond the recorded list.
    yield lookup("no num_kv_readers", key(num_kv_readers=MISSING))
    yield lookup("no cache_salt", key(cache_salt=MISSING))
    yield lookup("no request_configs", key(request_configs=MISSING))
    for name in ("model_name", "world_size", "worker_id", "token_ids", "start", "end", "request_id"):
        yield lookup(f"no {name}", key(**{name: MISSING}))
    yield lookup("unknown field", key(flavour=[{"x": [1, {"y": None}]}, b"z"]))
    yield lookup("fields backwards", pack(dict(reversed(KEY.items()))))
    yield lookup("no tokens", key(token_ids=[]))
    yield lookup("token_ids nil", key(token_ids=None))
    yield lookup("token_ids announces one more", key()[:-1])
    yield lookup("array32 header of 4e9 tokens", key(token_ids=b"\xdd\xee\x6b\x28\x00"))
    yield lookup("map16 header", b"\xde\x00\x0a" + key()[1:])
    yield lookup("map32 header of 4e9 entries", b"\xdf\xee\x6b\x28\x00" + key()[1:])
    yield lookup("field name as bin", b"\x8b" + key()[1:] + pack(b"x") + one)
    yield lookup("reserved byte as a value", key(request_configs=map_of(pack("a") + b"\xc1")))
    salts = {"x" * 128: "of 128", "x" * 129: "of 129", "é" * 128: "of 128 two-byte characters",
             "a@b": "with @", "a/b": "with /", "a\\b": "with backslash", "a\0b": "with NUL"}
    for salt, name in salts.items():
        yield lookup(f"cache_salt {name}", key(cache_salt=salt))
    yield lookup("configs", key(request_configs={
        "lmcache.skip_save": True, "lmcache.ttl": 2.5, "lmcache.tag.a": "b", "x": [1, {"y": 2}]}))
    yield lookup("key empty map", b"\x80")
    yield lookup("key nil", b"\xc0")
    yield lookup("key empty frame", b"")
    yield "LOOKUP no tp_size", "lookup", [key()]
    yield "LOOKUP three payloads", "lookup", [key(), one, one]
    for text, name in ((b"\xc3", "true"), (pack(1.0), "1.0"), (pack(-1), "-1"),
                       (pack(2**64 - 1), "2**64-1"), (b"", "empty frame"), (b"\xc0", "nil"),
                       (pack("1"), "'1'"), (b"\xd3" + bytes(8), "int64 0")):
        yield f"PING payload {name}", "ping", [text]
    yield "PING no payload", "ping", []
    for value, name in ((0, "0"), (None, "nil"), ("", "''"), (1.0, "1.0"), (0.0, "0.0"), ([], "[]"),
                        ({"a": 1}, "map"), ("x", "'x'"), (True, "true"), (b"", "bin"), (-3, "-3")):
        yield f"CLEAR payload {name}", "clear", [pack(value)]
    yield "CLEAR no payload (client default is always sent)", "clear", []
    yield "CLEAR two values", "clear", [b"\xc2\xc2"]

    def wait(name, timeout):
        return f"wait_prefetch_status timeout {name}", "wait_prefetch_status", [pack("r"), timeout]

    yield wait("int", pack(1))
    yield wait("'1'", pack("1"))
    yield wait("float32", b"\xca\x3f\x80\x00\x00")
    yield wait("nil", b"\xc0")
    yield wait("true", b"\xc3")
    yield wait("nan", pack(float("nan")))
    yield wait("-1", pack(-1.0))
    yield wait("inf", pack(float("inf")))
    yield wait("2**64-1", pack(2**64 - 1))

    def unregister(name, value):
        return f"UNREGISTER id {name}", "unregister_kv_cache_engine_driven_context", [value]

    for value, name in (("12", "'12'"), (2**64 - 1, "2**64-1"), (b"12", "bin"), (" 12 ", "' 12 '"),
                        ("1_2", "'1_2'"), ("1__2", "'1__2'"), ("_1", "'_1'"), ("1_", "'1_'"),
                        ("+5", "'+5'"), ("-5", "'-5'"), ("+-5", "'+-5'"), ("", "''"), ("x", "'x'"),
                        ("- 5", "'- 5'"), ("0x10", "'0x10'"), ("1.5", "'1.5'"), (1.5, "1.5"),
                        (-1.5, "-1.5"), (True, "true"), (None, "nil"), ([1], "array"), ({}, "map"),
                        (float("nan"), "nan"), (float("inf"), "inf"), ("\t12\n", "tab 12 newline"),
                        ("00012", "'00012'"), ("9" * 30, "thirty nines")):
        yield unregister(name, pack(value))

    def register(name, frame):
        return f"REGISTER {name}", "register_kv_cache_engine_driven_context", [frame]

    yield register("baseline", entries(REGISTER))
    yield register("as array", pack(list(REGISTER.values())))
    yield register("use_mla=0", entries(REGISTER, use_mla=0))
    for name in REGISTER:
        yield register(f"missing {name}", entries(REGISTER, **{name: MISSING}))
    yield register("num_layers float", entries(REGISTER, num_layers=2.0))
    yield register("num_physical_slots nil", entries(REGISTER, num_physical_slots=None))
    yield register("instance_id text", entries(REGISTER, instance_id="12"))
    yield register("instance_id 2**64-1", entries(REGISTER, instance_id=2**64 - 1))
    yield register("unknown field", entries(REGISTER, extra={"a": [1]}))

    def commit(name, data):
        return f"COMMIT_STORE data {name}", "commit_store", [key(worker_id=0), ident, data]

    yield commit("as str", pack("x"))
    yield commit("nil", b"\xc0")
    yield commit("empty frame", b"")
    yield commit("bin32 empty", b"\xc6\0\0\0\0")
    yield commit("bin", pack(b"\x80\x04]."))
    yield commit("bin and one byte", pack(b"x") + b"\0")
    yield commit("bin cut", pack(b"xyz")[:-1])
    for value in (12, "12", 1.5, True, None, -1):
        yield f"PREPARE_STORE id {value!r}", "prepare_store", [key(worker_id=0), pack(value)]
    yield "PREPARE_RETRIEVE", "prepare_retrieve", [key(worker_id=0), ident]
    yield "COMMIT_RETRIEVE", "commit_retrieve", [key(worker_id=0), ident]
    yield "FREE_LOOKUP_LOCKS", "free_lookup_locks", [key(), one]
    for value in ("r", "", b"r", 1, None):
        yield f"END_SESSION {value!r}", "end_session", [pack(value)]
        yield f"QUERY {value!r}", "query_prefetch_status", [pack(value)]

    def report(name, records):
        return f"REPORT {name}", "report_block_allocation", [ident, pack("m"), records]

    yield report("none", b"\x90")
    yield report("two", pack([RECORD, RECORD]))
    yield report("unknown field", pack([{**RECORD, "x": [1]}]))
    yield report("no req_id", pack([{"new_block_ids": [], "new_token_ids": []}]))
    yield report("block id float", pack([{**RECORD, "new_block_ids": [1.0]}]))
    yield report("block id negative", pack([{**RECORD, "new_block_ids": [-1]}]))
    yield report("not a list", pack(RECORD))
    yield report("list of lists", pack([["r", [1], [2]]]))

    def subscribe(name, cursor, max_events):
        frames = [ident, pack("m"), pack(cursor), pack(max_events)]
        return f"SUBSCRIBE {name}", "subscribe_kv_events", frames

    yield subscribe("baseline", 0, 16)
    yield subscribe("text", "7", "16")
    yield subscribe("float", 1.0, 2.9)
    yield subscribe("1024", 0, 1024)
    yield "MODULE", "server_module_call", [pack({"method": "a.b", "payload": b"xyz"})]
    yield "MODULE no payload", "server_module_call", [pack({"method": "a.b"})]
    yield "MODULE payload text", "server_module_call", [pack({"method": "a.b", "payload": "x"})]
    yield "MODULE unknown field", "server_module_call", [
        pack({"x": 1, "method": "deep.module.call", "payload": b""})]
    yield "P2P query", "p2p_query_lookup_results", [pack(3)]
    yield "P2P query text", "p2p_query_lookup_results", [pack("3")]
    yield "NOOP with payload", "noop", [b"\xc0"]

    def kv_cache(name, tensors=None, engine=pack("vllm"), hints=b"\x80", groups=b"\x90", **others):
        frames = {"instance": ident, "tensors": array_of(tensor()) if tensors is None else tensors,
                  "model": pack("m"), "world": one, "engine": engine, "hints": hints,
                  "groups": groups, **others}
        return f"KV CACHE {name}", "register_kv_cache", list(frames.values())

    def tensor(code=1, view={}, **changes):
        data = entries(TENSOR, **{"metadata": entries(TENSOR["metadata"], **view), **changes})
        return pack(msgspec.msgpack.Ext(code, data))

    yield kv_cache("baseline")
    yield kv_cache("three tensors", array_of(tensor(), tensor(shm_name="x"), tensor(nbytes=2**40)))
    yield kv_cache("no tensors", b"\x90")
    yield kv_cache("tensors nil", b"\xc0")
    yield kv_cache("tensor as a map", pack([TENSOR]))
    yield kv_cache("tensor of extension type 2", array_of(tensor(code=2)))
    yield kv_cache("tensor pickled", array_of(pack(msgspec.msgpack.Ext(1, b"\x80\x04N."))))
    yield kv_cache("tensor empty", array_of(pack(msgspec.msgpack.Ext(1, b""))))
    for field in TENSOR:
        yield kv_cache(f"no {field}", array_of(tensor(**{field: MISSING})))
    for field in TENSOR["metadata"]:
        yield kv_cache(f"no {field} in metadata", array_of(tensor(1, {field: MISSING})))
    yield kv_cache("unknown type", array_of(tensor(type="tpu")))
    yield kv_cache("version 2", array_of(tensor(version=2)))
    yield kv_cache("unknown field", array_of(tensor(flavour=1)))
    yield kv_cache("unknown field in metadata", array_of(tensor(1, {"flavour": 1})))
    yield kv_cache("nbytes negative", array_of(tensor(nbytes=-1)))
    yield kv_cache("view as large as the segment", array_of(tensor(nbytes=4096)))
    yield kv_cache("view behind the segment", array_of(tensor(nbytes=4095)))
    yield kv_cache("view behind it by its offset", array_of(tensor(1, {"storage_offset": 30721})))
    yield kv_cache("view up to its end", array_of(tensor(1, {"storage_offset": 30720})))
    yield kv_cache("fewer strides", array_of(tensor(1, {"stride": [8, 1]})))
    yield kv_cache("stride negative", array_of(tensor(1, {"stride": [1024, 256, 128, 8, -1]})))
    yield kv_cache("empty view", array_of(tensor(1, {"shape": [2, 0, 2, 16, 8]}, nbytes=0)))
    for dtype in ("float8_e4m3fn", "uint8", "half", "torch.bfloat16", "complex256"):
        yield kv_cache(f"dtype {dtype}", array_of(tensor(1, {"dtype": dtype})))
    cuda = {"type": "cuda_raw", "version": 1, "ipc_handle": bytes(64), "alloc_offset": 0,
            "nbytes": 65536, "metadata": TENSOR["metadata"]}
    yield kv_cache("of CUDA", array_of(pack(msgspec.msgpack.Ext(1, pack(cuda)))))
    for engine in ("vllm", "atom", "sglang", "trtllm", "mock", "VLLM", 1, None):
        yield kv_cache(f"engine {engine!r}", engine=pack(engine))
    for hints in ({"kv_layout": "NHD", "num_kv_heads": 2, "tokens_per_block": 16, "head_dim": 8},
                  {"kv_layout": "HND", "kv_list_layout": "k_v"}, {"kv_list_layout": "unified"},
                  {"kv_layout": "BLHNC"}, {"kv_layout": "BLNHC"}, {"other": [1]},
                  {"kv_layout": "hnd"}, {"kv_list_layout": "v_k"}, {"head_dim": "8"}, None):
        yield kv_cache(f"hints {hints}", hints=pack(hints))
    full = EngineGroupInfo(engine_group_id=0, layer_indices=(0, 2), tokens_per_block=16)
    window = EngineGroupInfo(1, (1,), 32, 64)
    yield kv_cache("groups", groups=pack([full, window]))
    yield kv_cache("group without its id", groups=pack([{"layer_indices": [0]}]))
    yield kv_cache("group with its id alone", groups=pack([{"engine_group_id": 3}]))
    yield kv_cache("group with an unknown field", groups=pack([{"engine_group_id": 3, "x": [1]}]))
    yield kv_cache("world size as text", world=pack("2"))
    yield "KV CACHE six payloads", "register_kv_cache", kv_cache("")[2][:-1]
    yield "KV CACHE unregister", "unregister_kv_cache", [pack("12")]
    for blocks, name in (([[1, 2]], "of one group"), ([[1], [2, -3]], "of two groups"), ([], "none"),
                         ([[]], "of an empty group"), ([1], "flat"), ([[1.5]], "broken"),
                         ([["1"]], "as text"), (None, "nil"), ([[2**63 - 1]], "of 2**63-1")):
        frames = [key(worker_id=0), ident, pack(blocks), pack(b"handle")]
        yield f"STORE blocks {name}", "store", frames
        yield f"RETRIEVE blocks {name}", "retrieve", [*frames, pack(0)]
    frames = [key(worker_id=0), ident, pack([[1]])]
    yield "STORE event as text", "store", [*frames, pack("x")]
    yield "STORE no event", "store", frames
    for skip in (16, -1, "16", None):
        yield f"RETRIEVE skip {skip!r}", "retrieve", [*frames, pack(b""), pack(skip)]
    yield "RETRIEVE no skip", "retrieve", [*frames, pack(b"")]


def plain(value):
    """A value as JSON, bytes as {"bytes": hex}."""
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, float) and value != value:
        return "nan"
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return str(value)
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, types.DeviceIPCWrapper):
        return plain(value.to_wire())
    if isinstance(value, msgspec.Struct):
        return plain(msgspec.structs.asdict(value))
    if dataclasses.is_dataclass(value):
        return plain({f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
    if isinstance(value, dict):
        return {str(name): plain(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        return str(value)
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    return repr(type(value).__name__)


def payloads():
    for name, operation, frames in cases():
        spec = SPECS[operation]
        line = {"name": name, "op": operation, "payload": [frame.hex() for frame in frames]}
        try:
            values = unwrap_request_payloads(frames, list(spec.payload_types))
            line["values"] = [plain(value) for value in values]
        except Exception as error:
            line["dropped"] = type(error).__name__
        yield line


def results():
    def slots(count):
        return [{"offset": n * 70000, "length": 65536, "shape": [2, 32, 16, 128], "dtype": "bfloat16"}
                for n in range(count)]

    yield "noop", "OK"
    yield "ping", True
    yield "commit_store", False
    for number in (0, 127, 128, 255, 256, 65535, 65536, 2**31, 2**32, 2**63 - 1, -1, -32, -33,
                   -128, -129, -32768, -32769, -(2**31), -(2**31) - 1, -(2**63)):
        yield "get_chunk_size", number
        yield "query_prefetch_status", number
    for texts in ([], ["kv_event_stream"], ["x" * n for n in (0, 31, 32, 255, 256)] * 4):
        yield "get_experimental", texts
    for name, size in (("", 0), ("lmcache_l1_pool", 1 << 34), ("é" * 20, 2**64 - 1)):
        response = types.RegisterEngineDrivenContextResponse(shm_name=name, pool_size=size)
        yield "register_kv_cache_engine_driven_context", response
    yield "prepare_store", types.PrepareStoreResponse(context={})
    for count in (0, 1, 15, 16):
        context = {"slots": slots(count), "chunk_indices": list(range(count))}
        yield "prepare_store", types.PrepareStoreResponse(context=context)
        response = types.PrepareRetrieveResponse(True, b"", {"slots": slots(count)})
        yield "prepare_retrieve", response
    for size in (0, 1, 255, 256):
        yield "prepare_retrieve", types.PrepareRetrieveResponse(size > 1, bytes(size), {})
    yield "store", (b"", False)
    yield "retrieve", (b"handle", True)
    hashes = [bytes([n] * 32) for n in range(20)]
    stored = types.KVEventRecord(1, "stored", "CPU", "m", hashes[:1], hashes[1], [1, 200, 60000, 128000])
    first = types.KVEventRecord(2**40, "stored", "CPU", "m" * 40, hashes[:1], None, list(range(256)))
    removed = types.KVEventRecord(3, "removed", "CPU", "", hashes, None, [])
    for events in ([], [stored], [first, removed], [removed] * 17):
        yield "subscribe_kv_events", types.KVEventBatch(True, 2**60, 70000, False, events)
    yield "subscribe_kv_events", types.KVEventBatch(False, 0, 0, True, [])
    yield "server_module_call", ServerModuleCallResponse(True, b"out", "")
    yield "server_module_call", ServerModuleCallResponse(False, b"", "unknown method")
    for count in (0, 1, 16):
        yield "p2p_query_lookup_results", [TransferChannelAddress(offset=-1, size=0)] * count


def replies():
    for operation, result in results():
        encoded = msgspec_encode(result, SPECS[operation].response_type)
        yield {"op": operation, "result": plain(result), "frame": encoded.hex()}


def write(name, lines):
    text = "".join(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n" for line in lines)
    (HERE / name).write_text(text)


write("payloads.jsonl", payloads())
write("replies.jsonl", replies())
