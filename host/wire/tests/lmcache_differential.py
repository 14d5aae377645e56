#!/usr/bin/env python3
"""Compares what stockade-wire and LMCache 0.5.6 make of mutated requests.

    cargo build --release -p stockade-wire --example decode_requests
    python3 host/wire/tests/lmcache_differential.py target/release/examples/decode_requests [count]

Ends with 0 if both accept and drop the same, but for the differences listed in `expected`;
with 0 and a note if LMCache is not installed; with 1 at differences.
"""

import collections
import json
import pathlib
import random
import subprocess
import sys

try:
    import msgspec
    from lmcache.v1.multiprocess.rpc import get_rpc_specs
    from lmcache.v1.multiprocess.transport.zmq_impl.mq import unwrap_request_payloads
except ImportError:
    print("skipped: LMCache is not installed")
    sys.exit(0)

GOLDEN = pathlib.Path(__file__).parent / "golden"
SPECS = get_rpc_specs()
# Served there by modules that Stockade does not have; the payload is not looked at.
UNSERVED = {"store_q"} | {
    name for name in SPECS if name.startswith(("cb_", "register_q", "unregister_q"))
}
pack = msgspec.msgpack.encode


def seeds():
    for line in (GOLDEN / "payloads.jsonl").read_text().splitlines():
        case = json.loads(line)
        yield case["op"], [bytes.fromhex(frame) for frame in case["payload"]]
    for line in (GOLDEN / "recorded.jsonl").read_text().splitlines():
        case = json.loads(line)
        if case["from"] == "client" and case["op"] in SPECS and case["op"] not in UNSERVED:
            yield case["op"], [bytes.fromhex(frame) for frame in case["frames"][2:]]


def any_value(rng, depth=0):
    """A value of any msgpack type."""
    kinds = ["nil", "bool", "int", "big", "float", "str", "bin", "ext"]
    kind = rng.choice(kinds + (["list", "map"] if depth < 3 else []))
    match kind:
        case "nil":
            return None
        case "bool":
            return rng.random() < 0.5
        case "int":
            return rng.randint(-300, 70000)
        case "big":
            return rng.randint(-(2**63), 2**64 - 1)
        case "float":
            return rng.choice([0.0, 1.0, -1.5, float("inf"), rng.random() * 1e9])
        case "str":
            return rng.choice(["", "m", "12", " 7_0 ", "@", "float16", "x" * rng.randint(0, 200)])
        case "bin":
            return rng.randbytes(rng.randint(0, 40))
        case "ext":
            return msgspec.msgpack.Ext(rng.choice([1, 5, 127]), rng.randbytes(rng.randint(0, 9)))
        case "list":
            return [any_value(rng, depth + 1) for _ in range(rng.randint(0, 5))]
    return {f"k{n}": any_value(rng, depth + 1) for n in range(rng.randint(0, 5))}


def mutate(rng, frames):
    """One change of structure or of bytes."""
    frames = list(frames)
    if not frames:
        return frames
    at = rng.randrange(len(frames))
    try:
        value = msgspec.msgpack.decode(frames[at])
    except Exception:
        value = None
    choice = rng.random()
    if isinstance(value, dict) and value and choice < 0.6:
        name = rng.choice(list(value))
        if choice < 0.4:
            value[name] = any_value(rng)
        elif choice < 0.5:
            del value[name]
        else:
            value[rng.choice(["extra", "key", f"{name}2"])] = any_value(rng)
        try:
            frames[at] = pack(value)
        except Exception:
            pass
    elif choice < 0.7:
        frames[at] = pack(any_value(rng))
    else:
        changed = bytearray(frames[at] or b"\0")
        for _ in range(rng.randint(1, 3)):
            spot = rng.randrange(len(changed)) if changed else 0
            match rng.randrange(4):
                case 0 if changed:
                    changed[spot] = rng.randrange(256)
                case 1 if changed:
                    changed[spot] ^= 1 << rng.randrange(8)
                case 2:
                    changed.insert(spot, rng.randrange(256))
                case _:
                    del changed[spot:spot + 1]
        frames[at] = bytes(changed)
    return frames


def lmcache(operation, frames):
    """The values its handler would get, or None where it drops the request."""
    try:
        return unwrap_request_payloads(frames, list(SPECS[operation].payload_types))
    except Exception:
        return None


def in_range(value, low, high):
    return value is None or low <= value <= high


def expected(operation, frames, theirs, ours):
    """Why both may differ here, or None."""
    if theirs is None and operation in ("lookup", "free_lookup_locks") and len(frames) == 2:
        if lmcache(operation, [frames[0], pack(1)]) is not None:
            return "tp_size, which nobody reads, is no number"
    if theirs is None and operation.startswith("p2p_"):
        return "a peer's keys are counted, not read"
    if theirs is None:
        # msgspec decodes timestamps and refuses map keys that Python cannot hash.
        return "an extension or map key that only msgspec looks into" if exotic(frames) else None
    key = theirs[0] if theirs else None
    if hasattr(key, "token_ids"):
        u32 = 2**32 - 1
        if not all(in_range(token, 0, u32) for token in key.token_ids):
            return "a token beyond 32 bits, which LMCache's hasher fails on"
        if not (in_range(key.world_size, 0, u32) and in_range(key.worker_id, 0, u32)):
            return "a rank beyond 32 bits"
        if key.start < 0 or key.end < 0:
            return "a negative range"
    if operation.startswith("register_kv_cache_engine"):
        sizes = [key.world_size, key.block_size, key.num_layers, key.hidden_dim_size]
        slots = key.num_physical_slots
        if not all(in_range(size, 0, 2**32 - 1) for size in sizes):
            return "a size beyond 32 bits"
        if slots is not None and not 1 <= slots < 2**32:
            return "num_physical_slots, which LMCache's handler refuses"
        if "must be a dtype" in ours:
            return "dtype_str, which LMCache's handler refuses"
    if operation in ("register_kv_cache", "store", "retrieve") and " is outside " in ours:
        return "a world size, group or block id beyond what it can be"
    if operation == "register_kv_cache" and "sw_size_tokens" in ours:
        return "a window of no tokens, which LMCache's handler fails on"
    if operation == "subscribe_kv_events" and (theirs[2] < 0 or not 1 <= theirs[3] <= 1024):
        return "cursor or max_events, which LMCache's handler refuses"
    if operation == "report_block_allocation" and "9223372036854775807" in ours:
        return "an id beyond 63 bits"
    if "1e38" in ours or any(isinstance(v, int) and abs(v) >= 10**38 for v in theirs):
        return "an integer beyond 127 bits"
    if isinstance(key, int) and abs(key) >= 10**38:
        return "an integer beyond 127 bits"
    return None


def exotic(frames):
    def holds(data):
        return any(byte in data for byte in (0xD6, 0xD7, 0xC7, 0xC8, 0xC9, 0xD4, 0xD5, 0xD8)) or \
            any(0x80 <= byte <= 0x9F or 0xDC <= byte <= 0xDF for byte in data[1:])
    return any(holds(frame) for frame in frames)


def main():
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 20000
    child = subprocess.Popen(
        [sys.argv[1]], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
    rng = random.Random(12)
    start = [seed for seed in seeds() if lmcache(*seed) is not None]
    outcome = collections.Counter()
    reasons = collections.Counter()
    differences = []
    for number in range(count):
        operation, frames = rng.choice(start)
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            frames = mutate(rng, frames)
        line = " ".join(frame.hex() or "-" for frame in [b"\x01", pack(operation), *frames])
        child.stdin.write(line + "\n")
        ours = child.stdout.readline().rstrip()
        assert ours, "the decoder ended"
        theirs = lmcache(operation, frames)
        accepted = ours.startswith("ok ")
        if accepted == (theirs is not None):
            outcome["accepted" if accepted else "dropped"] += 1
            continue
        reason = expected(operation, frames, theirs, ours)
        if reason:
            reasons[reason] += 1
        else:
            differences.append((operation, line, ours, str(theirs)[:300]))
    for difference in differences[:20]:
        print(*difference, sep="\n  ")
    print(f"{count} requests: {outcome['accepted']} accepted by both, {outcome['dropped']} by none, "
          f"{len(differences)} unexplained differences")
    for reason, times in reasons.most_common():
        print(f"  {times}: {reason}")
    sys.exit(bool(differences))


main()
