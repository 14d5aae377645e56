#!/usr/bin/env python3
"""An engine goes on after its server was killed and started again, without a restart of its own.

    engine_survives_restart.py STOCKADE [--inline]

Runs LMCache 0.5.6's worker and scheduler adapters, as vLLM does, against STOCKADE, which is killed
with SIGKILL and started again on the same port and segment:

1. at once, so that no ping ever fails: the engine is told by a ping's answer;
2. after the engine has noticed: it recovers by itself.

Each time stores in between are declined without an exception, what was stored is found to be gone,
and storing and retrieving works again. `--inline` moves the KV without shared memory.
"""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "examples/transformers-cpu"))
from engine import BLOCK, PATIENCE, Engine, Paged  # noqa: E402

import torch  # noqa: E402


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Server:
    def __init__(self, binary, inline):
        self.port = free_port()
        name = "" if inline else f"stockade-restart-{self.port}"
        self.command = [
            binary, "serve", "--host", "127.0.0.1", "--port", str(self.port), "--http-port", "0",
            "--l1-size-gb", "0.0625", "--shm-name", name,
        ]
        self.start()

    def start(self):
        self.child = subprocess.Popen(
            self.command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        for line in self.child.stderr:
            if "serving on" in line:
                break
        else:
            raise AssertionError("the server did not start")

    def kill(self):
        self.child.kill()
        self.child.wait()
        self.child.stderr.close()

    def stop(self):
        if self.child.poll() is None:
            self.child.send_signal(signal.SIGTERM)
            self.child.wait(20)


def until(what, condition):
    deadline = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what} did not come within {PATIENCE} s"
        time.sleep(0.02)
    return value


def round_trip(engine, name, seed):
    """Stores two chunks and reads them back into other blocks."""
    generator = torch.Generator().manual_seed(seed)
    for layer in engine.kv.layers.values():
        layer.copy_(torch.rand(layer.shape, generator=generator))
    tokens = torch.randint(0, 1000, (512,), generator=generator).tolist()
    source, target = list(range(32)), list(range(40, 72))
    if not engine.store(f"{name}-store", tokens, source):
        return False
    found = engine.cached_tokens(f"{name}-load", tokens)
    assert found == 512, f"{name}: {found} tokens found"
    assert engine.retrieve(f"{name}-load", tokens, target)
    engine.scheduler.end_session(f"{name}-load")
    for layer in engine.kv.layers.values():
        assert torch.equal(layer[:, source], layer[:, target]), "other bytes came back"
    return True


def main():
    binary, inline = sys.argv[1], "--inline" in sys.argv[2:]
    server = Server(binary, inline)
    try:
        engine = Engine(f"tcp://127.0.0.1:{server.port}")
        assert round_trip(engine, "first", 1)
        for number, downtime in enumerate((0.0, 4.0)):
            old = [1] * 512
            assert engine.store(f"old-{number}", old, list(range(32)))
            server.kill()
            if downtime:
                until("the engine's notice", lambda: not engine.worker.is_healthy)
                time.sleep(downtime)
            began = time.monotonic()
            server.start()
            until("the scheduler's recovery", lambda: engine.scheduler.is_healthy)
            # Used at once, when the worker may not know yet: declined, and nothing raised.
            attempts = 1
            while not round_trip(engine, f"again-{number}-{attempts}", 10 * number + attempts):
                assert time.monotonic() - began < PATIENCE, "the worker does not recover"
                attempts += 1
                time.sleep(0.1)
            recovered = time.monotonic() - began
            gone = engine.cached_tokens(f"gone-{number}", old)
            assert gone == 0, f"{gone} tokens of the killed server are still found"
            print(
                f"killed, {downtime:.0f} s later started again: the engine stores and retrieves "
                f"after {recovered:.1f} s (heartbeat 1 s), {attempts - 1} stores declined"
            )
        engine.close()
    finally:
        server.stop()
    leftover = [name for name in os.listdir("/dev/shm") if name.endswith(f"restart-{server.port}")]
    assert not leftover, leftover


main()
