#!/usr/bin/env python3
"""Writes the seeds of the fuzz targets: frames and pickles from host/wire/tests/golden, the manifests
of the examples, and what stands here."""

import json
import pathlib
import re
import struct

HERE = pathlib.Path(__file__).resolve().parent
GOLDEN = HERE.parent.parent / "host/wire/tests/golden"
MAX_SEED_BYTES = 4096

MANIFEST = b"""
enabled = true
restart = "on-failure"
stop_grace_seconds = 5
sandbox = true
env = ["HOME", "A_*"]
[directories]
"/data" = { host = "/tmp/x", access = "read-write" }
[limits]
memory_mib = 64
cpu_percent = 10
log_lines_per_second = 100
log_kib_per_second = 64
table_elements = 1000
cpu_burst_ms = 100
cpu_weight = 100
start_seconds = 10
run_seconds = 0
host_call_seconds = 10
environment_kib = 256
open_files = 32
directory_mib = 64
[process]
required = ["landlock", "seccomp"]
network = false
unix_sockets = true
user = "nobody"
memory_mib = 100
cpu_seconds = 10
open_files = 64
file_mib = 10
processes = 8
tmp_mib = 16
"""
CONFIG = b"""
[serve]
host = "0.0.0.0"
port = 5555
chunk-size = 256
l1-align-bytes = 4096
eviction-policy = "S3FIFO"
eviction-trigger-watermark = 0.8
eviction-ratio = 0.2
l1-write-ttl-seconds = 600
listen = ["ipc:///tmp/s", "tcp://127.0.0.1:1"]
runtime-plugin-locations = ["a.wasm"]
runtime-plugin-config = "{\\"key\\": 1}"
worker-reap-timeout-seconds = 120.0
worker-registration-grace-seconds = 3600.0
native-plugins = "confined"
log-level = "info"
log-format = "json"
[[listener]]
name = "default"
mechanism = "null"
[[listener]]
name = "local"
endpoint = "ipc:///tmp/t"
ipc-mode = "0660"
[tenants.a]
salts = ["red", "blue"]
floor_gb = 0.25
weight = 2
cap_gb = 0.5
[tenants.rest]
weight = 1
[plugins]
require_signatures = false
compile_seconds = 10
[plugins.a]
enabled = true
env = []
directories = { "/data" = "read-only" }
limits = { memory_mib = 10 }
[plugins."*".process]
network = false
"""
LOG = b"plain\r\n\n\xc3\xa4\xe2\x80\xae\x1b[31mred\0\xff\ttab\nno end" + bytes(300)


def write(target, name, data):
    if len(data) <= MAX_SEED_BYTES:
        folder = HERE / "seeds" / target
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def zmtp(frames):
    """A message of short frames."""
    out = b""
    for index, frame in enumerate(frames):
        more = 1 if index + 1 < len(frames) else 0
        if len(frame) < 256:
            out += bytes([more, len(frame)]) + frame
        else:
            out += bytes([more | 2]) + struct.pack(">Q", len(frame)) + frame
    return out


def command(body):
    return bytes([4, len(body)]) + body


def greeting(mechanism):
    return b"\xff" + bytes(8) + b"\x7f\x03\x01" + mechanism.ljust(20, b"\0") + bytes(32)


# What follows the padding of a HELLO that libzmq made for a server whose secret key is 32 times 7.
CURVE_HELLO = bytes.fromhex(
    "d0891e7486e277536cd3cab2d893b867faad20c7ca78fada0781d9ac0f85186a0000000000000001f0e09db863fc2670"
    "0cadbbab7f257a912eb0d180555f0ee6535d0a14a8e934938f3055e91eeb9a97d572e06905525913b724af82cc87740d"
    "b530ac13d630cd5d4b8bc1f0783380a8b7ed6832b6c48000"
)


def main():
    metadata = b"\x0bSocket-Type" + struct.pack(">I", 6) + b"DEALER" + b"\x08Identity" + struct.pack(">I", 2) + b"id"
    null = greeting(b"NULL") + command(b"\x05READY" + metadata)
    plain = greeting(b"PLAIN") + command(b"\x05HELLO\x04user\x06secret") + command(b"\x08INITIATE" + metadata)
    ping = command(b"\x04PING\x00\x0acontext")
    hello = greeting(b"CURVE") + command(b"\x05HELLO\x01\0" + bytes(72) + CURVE_HELLO)
    requests = []
    for number, line in enumerate((GOLDEN / "recorded.jsonl").read_text().splitlines()):
        record = json.loads(line)
        if record["from"] != "client":
            continue
        frames = [bytes.fromhex(frame) for frame in record["frames"]]
        requests.append(frames)
        packed = b"".join(struct.pack(">H", len(frame)) + frame for frame in frames)
        write("decode_request", f"{number:03}-{record['op']}", packed)
    stream = b"".join(zmtp(frames) for frames in requests[:12])
    for name, data in {
        "null": b"\0" + null + stream,
        "null-pieces": b"\x0e" + null + ping + stream,
        "plain": b"\x01" + plain + ping + stream,
        "curve": b"\x03" + hello + command(b"\x08INITIATE" + bytes(241)) + stream,
        "large": b"\0" + null + zmtp([b"uid", bytes(2000)]) + b"\x02" + struct.pack(">Q", 1 << 40),
    }.items():
        write("zmtp_decoder", name, data)
    for path in sorted((GOLDEN / "pickle").glob("*.pkl")):
        write("pickle", path.stem, path.read_bytes())
    for target, text in (("manifest", MANIFEST), ("config_file", CONFIG)):
        write(target, "everything", text)
        tables = re.split(rb"(?m)^(?=\[)", text)
        for number, table in enumerate(tables):
            write(target, f"table-{number}", table)
        # The fuzzer cannot guess names that are compared by code that has no counters.
        words = sorted(set(re.findall(rb"[A-Za-z][A-Za-z_-]{2,}", text)))
        lines = [b'"' + word + b'"' for word in words]
        (HERE / f"{target}.dict").write_bytes(b"\n".join(lines) + b"\n")
    # What fuzzing found: a refusal that repeated the two lines as they are.
    write("manifest", "value-of-two-lines", b'[directories]\n"/a" = { host = """b\nc""" }\n')
    digest = b"ab" * 32
    for name, text in {
        "key": b"org/model@00010203@0@" + digest + b"@red",
        "file": b"org-SEP-model@0x00010203@0@" + digest + b"@red.data",
        "parts": b"\x01\0\0\0\x02\0\0\0org/model-SEP|red",
        "fs": b'{"type": "fs", "base_path": "/d", "max_capacity_gb": 1.5, "eviction": {"eviction_policy": "LRU"}}',
        "resp": b'{"type": "resp", "host": "h", "port": 6379, "username": "u", "password": "p", "num_workers": 4}',
        "s3": b'{"type": "s3", "s3_endpoint": "https://h", "s3_region": "r", "shared": true, "persist_enabled": true}',
        "faults": b'{"type": "fault_inject", "rate": 0.5, "seed": 1, "inner": {"type": "mock", "max_size_gb": 1}}',
    }.items():
        write("l2_names", name, text)
    words = re.findall(rb'"([a-z_0-9]+)":', b"".join((HERE / "seeds/l2_names").joinpath(it).read_bytes() for it in ("fs", "resp", "s3", "faults")))
    lines = [b'"\\"' + word + b'\\""' for word in sorted({*words, b"fs", b"resp", b"s3", b"mock"})]
    (HERE / "l2_names.dict").write_bytes(b"\n".join([*lines, b'"-SEP-"', b'".data"', b'"@"']) + b"\n")
    write("log_stream", "plain", b"\x03" + LOG)
    write("log_stream", "repeated", b"\xe0" + LOG)


main()
