#!/usr/bin/env python3
"""Writes the seeds of the fuzz targets from the recorded frames and pickles of host/wire/tests/golden."""

import json
import pathlib
import struct

HERE = pathlib.Path(__file__).resolve().parent
GOLDEN = HERE.parent.parent / "host/wire/tests/golden"
MAX_SEED_BYTES = 4096


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


def main():
    metadata = b"\x0bSocket-Type" + struct.pack(">I", 6) + b"DEALER" + b"\x08Identity" + struct.pack(">I", 2) + b"id"
    null = greeting(b"NULL") + command(b"\x05READY" + metadata)
    plain = greeting(b"PLAIN") + command(b"\x05HELLO\x04user\x06secret") + command(b"\x08INITIATE" + metadata)
    ping = command(b"\x04PING\x00\x0acontext")
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
        "large": b"\0" + null + zmtp([b"uid", bytes(2000)]) + b"\x02" + struct.pack(">Q", 1 << 40),
    }.items():
        write("zmtp_decoder", name, data)
    for path in sorted((GOLDEN / "pickle").glob("*.pkl")):
        write("pickle", path.stem, path.read_bytes())


main()
