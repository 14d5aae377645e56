#!/usr/bin/env python3
"""Two users of one PLAIN listener with libzmq, each of a tenant of its own: equal prompts never meet, a
wrong password does not come in, and a user of no tenant finds nothing.

    tests/lmcache/plain_users.py STOCKADE

STOCKADE is a built binary; the interpreter needs pyzmq and msgspec. LMCache's own client gives no user,
so the frames are written here; `tests/lmcache/tenants.py` is the same with listeners and LMCache's client.
"""

import os
import pathlib
import sys
import tempfile

import msgspec
import zmq

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "bench"))
from server import Server  # noqa: E402

CHUNK = 256
PASSWORDS = {"ann": "correct horse battery", "bob": "staple and more of it", "eve": "of no tenant at all"}


class Client:
    def __init__(self, url, user, password):
        self.socket = zmq.Context.instance().socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.plain_username = user.encode()
        self.socket.plain_password = password.encode()
        self.socket.connect(url)

    def call(self, operation, *arguments, patience_ms=30_000):
        frames = [msgspec.msgpack.encode(part) for part in (1, operation, *arguments)]
        self.socket.send_multipart(frames)
        if not self.socket.poll(patience_ms):
            return "no answer"
        frames = self.socket.recv_multipart()
        return msgspec.msgpack.decode(frames[2]) if len(frames) > 2 else None

    def found(self, request, salt=""):
        self.call("lookup", key(request, None, salt), 1)
        chunks = self.call("query_prefetch_status", request)
        self.call("end_session", request)
        return chunks


def key(request, rank=None, salt=""):
    return {
        "model_name": "m", "world_size": 1, "worker_id": rank, "token_ids": list(range(CHUNK)), "start": 0,
        "end": CHUNK, "request_id": request, "cache_salt": salt, "request_configs": None, "num_kv_readers": 1,
    }


def store(client, byte):
    context = {
        "instance_id": 1, "model_name": "m", "world_size": 1, "block_size": 16, "use_mla": False,
        "num_physical_slots": None, "num_layers": 2, "hidden_dim_size": 16, "dtype_str": "float16",
    }
    segment = client.call("register_kv_cache_engine_driven_context", context)["shm_name"]
    slots = client.call("prepare_store", key("s", 0), 1)["context"]["slots"]
    with open(f"/dev/shm/{segment}", "r+b", buffering=0) as pool:
        for slot in slots:
            os.pwrite(pool.fileno(), bytes([byte]) * slot["length"], slot["offset"])
    return client.call("commit_store", key("s", 0), 1, b"")


def check(what, got, wanted):
    print(f"{what}: {got}")
    if got != wanted:
        raise SystemExit(f"{what} should be {wanted}")


def main():
    binary = pathlib.Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as directory:
        users = pathlib.Path(directory, "users")
        users.touch(mode=0o600)
        users.write_text("".join(f"{name}:{password}\n" for name, password in PASSWORDS.items()))
        url = f"ipc://{directory}/users.sock"
        config = pathlib.Path(directory, "stockade.toml")
        config.write_text(
            f'[[listener]]\nname = "users"\nendpoint = "{url}"\nmechanism = "plain"\nusers-file = "{users}"\n'
            '[tenants.anns]\nsalts = ["salt-of-ann"]\nlisteners = ["users"]\nusers = ["ann"]\n'
            '[tenants.bobs]\nsalts = ["salt-of-bob"]\nlisteners = ["users"]\nusers = ["bob"]\n'
        )
        with Server(binary, "--config", config, "--l1-size-gb", "0.0625"):
            ann, bob, eve = (Client(url, name, password) for name, password in PASSWORDS.items())
            check("ann stores", store(ann, 1), True)
            check("ann finds", ann.found("a"), 1)
            check("bob finds of the same prompt", bob.found("b"), 0)
            check("bob stores", store(bob, 2), True)
            check("ann finds with bob's salt", ann.found("c", "salt-of-bob"), 0)
            check("eve finds with ann's salt", eve.found("e", "salt-of-ann"), 0)
            wrong = Client(url, "ann", "staple and more of it")
            check("a wrong password", wrong.call("noop", patience_ms=1000), "no answer")
    print("OK")


if __name__ == "__main__":
    main()
