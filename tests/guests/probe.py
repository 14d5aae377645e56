"""Tries what a plugin must not do, and prints one line `attempt: ok` or `attempt: denied` each.

PROBE is a JSON object: the numbers and paths to try. Every attempt is bounded.
"""

import ctypes
import errno
import json
import os
import signal
import socket
import subprocess
import tempfile

TARGETS = json.loads(os.environ["PROBE"])


def attempt(name):
    def run(function):
        try:
            denied = function() is False
        except (OSError, MemoryError, subprocess.SubprocessError):
            denied = True
        print(f"{name}: {'denied' if denied else 'ok'}", flush=True)

    return run


@attempt("secret in the environment")
def _():
    return "hunter2" in "".join(os.environ.values())


@attempt("environment of the server")
def _():
    with open(f"/proc/{TARGETS['server']}/environ", "rb") as environment:
        return len(environment.read()) > 0


@attempt("signal to the server")
def _():
    os.kill(TARGETS["server"], 0)


for kind in ("outside", "shadow", "shm", "read grant", "write grant"):

    @attempt(f"read of {kind}")
    def _():
        with open(TARGETS[kind], "rb") as file:
            file.read()


for kind in ("outside", "read grant", "write grant"):

    @attempt(f"change of the mode of {kind}")
    def _():
        os.chmod(TARGETS[kind], 0o600)


for kind in ("beside the script", "into read grant", "into write grant"):

    @attempt(f"write {kind}")
    def _():
        with open(TARGETS[kind], "wb") as file:
            file.write(b"x")


@attempt("temporary file")
def _():
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"x")


@attempt("execution of a temporary file")
def _():
    path = os.path.join(tempfile.gettempdir(), "program")
    with open(path, "w") as file:
        file.write("#!/bin/sh\nexit 0\n")
    os.chmod(path, 0o700)
    subprocess.run([path], check=True)


@attempt("connection by TCP")
def _():
    socket.create_connection(("127.0.0.1", TARGETS["tcp"]), timeout=5).close()


@attempt("connection by UNIX socket")
def _():
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(TARGETS["unix"])


@attempt("raw packets")
def _():
    socket.socket(socket.AF_PACKET, socket.SOCK_RAW).close()


@attempt("capability")
def _():
    with open("/proc/self/status") as status:
        held = next(line for line in status if line.startswith("CapEff:"))
    return int(held.split()[1], 16) != 0


@attempt("new user namespace")
def _():
    pid = os.fork()
    if pid == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        os._exit(1 if libc.unshare(0x10000000) else 0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@attempt("memory of 1 GiB")
def _():
    # Never touched, so it costs the machine nothing.
    return len(bytearray(1 << 30)) > 0


@attempt("fork bomb")
def _():
    children = []
    try:
        for _ in range(TARGETS["forks"]):
            pid = os.fork()
            if pid == 0:
                signal.pause()
                os._exit(0)
            children.append(pid)
    except OSError as error:
        if error.errno != errno.EAGAIN:
            raise
        return False
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)
        for pid in children:
            os.waitpid(pid, 0)


print("done", flush=True)
