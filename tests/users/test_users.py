#!/usr/bin/env python3
"""Two users of one listener with libzmq, by password and by key, each of a tenant of its own: equal
prompts never meet, who has neither does not come in, and a user of no tenant finds nothing.

    tests/users/test_users.py STOCKADE

STOCKADE is a built binary; the interpreter needs the packages of tests/traces/requirements.txt. LMCache's
own client gives no user, so the frames are written here; `tests/lmcache/tenants.py` is the same with
listeners and LMCache's client.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import msgspec
import zmq

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "bench"))
from server import Server  # noqa: E402

CHUNK = 256
PASSWORDS = {"ann": "correct horse battery", "bob": "staple and more of it", "eve": "of no tenant at all"}


class Client:
    def __init__(self, url, **options):
        self.socket = zmq.Context.instance().socket(zmq.DEALER)
        self.socket.linger = 0
        for name, value in options.items():
            setattr(self.socket, name, value)
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


TENANTS = """
[tenants.anns]
salts = ["salt-of-ann"]
listeners = ["users"]
users = ["ann"]
[tenants.bobs]
salts = ["salt-of-bob"]
listeners = ["users"]
users = ["bob"]
"""


def private(path, text):
    path.touch(mode=0o600)
    path.write_text(text)
    return path


def passwords(binary, directory):
    """The listener's table, and what each user gives, with those who must not come in."""
    users = private(directory / "users", "".join(f"{name}:{password}\n" for name, password in PASSWORDS.items()))
    gives = lambda user, password: {"plain_username": user.encode(), "plain_password": password.encode()}
    known = {name: gives(name, password) for name, password in PASSWORDS.items()}
    strangers = {
        "another's password": gives("ann", PASSWORDS["bob"]),
        "no password": {},
    }
    return f'mechanism = "plain"\nusers-file = "{users}"\n', known, strangers


def keys(binary, directory):
    """As `passwords`, with CURVE."""
    pairs = {}
    for name in ("server", "stranger", *PASSWORDS):
        path = directory / f"{name}.key"
        made = subprocess.run([binary, "curve-keygen", path], check=True, stdout=subprocess.PIPE)
        assert path.stat().st_mode & 0o777 == 0o600
        pairs[name] = (made.stdout.strip(), path.read_bytes().strip())
        again = subprocess.run([binary, "curve-keygen", path], stderr=subprocess.PIPE)
        assert again.returncode != 0 and path.read_bytes().strip() == pairs[name][1]
    users = private(directory / "users", "".join(f"{name}:{pairs[name][0].decode()}\n" for name in PASSWORDS))

    def gives(public, secret, server="server"):
        public, secret, server = pairs[public][0], pairs[secret][1], pairs[server][0]
        return {"curve_publickey": public, "curve_secretkey": secret, "curve_serverkey": server}

    known = {name: gives(name, name) for name in PASSWORDS}
    strangers = {
        "an unknown key": gives("stranger", "stranger"),
        "another's public key": gives("ann", "stranger"),
        "another server's key": gives("ann", "ann", "stranger"),
        "no key": {},
    }
    secret = directory / "server.key"
    return f'mechanism = "curve"\nusers-file = "{users}"\nsecret-key-file = "{secret}"\n', known, strangers


def is_in(audit, seconds=30):
    """Whether somebody was refused as unauthenticated; the lines are written when there is time."""
    wanted = ("unauthenticated", "connect", "listener users")
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        lines = [json.loads(line) for path in audit.iterdir() for line in path.read_text().rpartition("\n")[0].splitlines()]
        told = {(line["reason"], line["operation"], line["origin"].partition(" through ")[2]) for line in lines}
        if wanted in told:
            return True
        time.sleep(0.05)
    return False


def try_users(binary, users):
    with tempfile.TemporaryDirectory() as directory:
        directory = pathlib.Path(directory)
        table, known, strangers = users(binary, directory)
        url = f"ipc://{directory}/users.sock"
        config = directory / "stockade.toml"
        config.write_text(f'[[listener]]\nname = "users"\nendpoint = "{url}"\n{table}{TENANTS}')
        subprocess.run([binary, "config", "check", "--l1-size-gb", "1", "--config", config], check=True, stdout=subprocess.DEVNULL)
        audit = directory / "audit"
        with Server(binary, "--config", config, "--l1-size-gb", "0.0625", "--audit-log-dir", audit) as server:
            ann, bob, eve = (Client(url, **gives) for gives in known.values())
            check("ann stores", store(ann, 1), True)
            check("ann finds", ann.found("a"), 1)
            check("bob finds of the same prompt", bob.found("b"), 0)
            check("bob stores", store(bob, 2), True)
            check("ann finds with bob's salt", ann.found("c", "salt-of-bob"), 0)
            check("eve finds with ann's salt", eve.found("e", "salt-of-ann"), 0)
            for what, gives in strangers.items():
                check(what, Client(url, **gives).call("noop", patience_ms=1000), "no answer")
            check("ann still finds", ann.found("d"), 1)
            check("it is in the audit log", is_in(audit), True)
            for secret in (*PASSWORDS.values(), *(path.read_text().strip() for path in directory.glob("*.key"))):
                assert secret not in server.log(), "a secret is in the log"


def main():
    binary = pathlib.Path(sys.argv[1]).resolve()
    for users in (passwords, keys):
        print(f"users by {users.__name__}")
        try_users(binary, users)
    print("OK")


if __name__ == "__main__":
    main()
