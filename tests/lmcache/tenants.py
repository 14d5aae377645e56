#!/usr/bin/env python3
"""Two engines with LMCache's own client, unmodified, on two listeners of one server: the same prompts
and no cache salt, as SGLang sends them. Neither finds what the other has stored; nor does one that
sends the other's salt.

    tests/lmcache/tenants.py STOCKADE [--inline]

STOCKADE is a built binary; the interpreter needs lmcache==0.5.6 and transformers. Prints a transcript.
"""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "examples/transformers-cpu"))
from engine import Engine  # noqa: E402

import torch  # noqa: E402

PROMPTS = 8
TOKENS = 512
SALTS = {"red": "salt-of-red", "blue": "salt-of-blue"}


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def configuration(directory, ports):
    text = ""
    for name, port in ports.items():
        text += f"""
[[listener]]
name = "{name}"
endpoint = "tcp://127.0.0.1:{port}"

[tenants.{name}]
salts = ["{SALTS[name]}"]
listeners = ["{name}"]
"""
    path = pathlib.Path(directory) / "stockade.toml"
    path.write_text(text)
    print(f"stockade.toml:\n{text}")
    return path


def start(binary, config, inline):
    name = "" if inline else f"stockade-tenants-{os.getpid()}"
    child = subprocess.Popen(
        [
            binary, "serve", "--host", "127.0.0.1", "--port", "0", "--http-port", "0",
            "--l1-size-gb", "0.25", "--shm-name", name, "--config", config,
        ],
        stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )
    for line in child.stderr:
        if "serving on" in line:
            return child
    raise AssertionError("the server did not start")


def prompts():
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(0, 1000, (TOKENS,), generator=generator).tolist() for _ in range(PROMPTS)]


def fill(engine, seed):
    generator = torch.Generator().manual_seed(seed)
    for layer in engine.kv.layers.values():
        layer.copy_(torch.rand(layer.shape, generator=generator))


def found(engine, request, tokens, salt=None):
    """Tokens that the server has; with LMCache's own parameter when a salt is sent."""
    if salt is None:
        tokens_found = engine.cached_tokens(request, tokens)
    else:
        engine.scheduler.maybe_submit_lookup_request(request, tokens, cache_salt=salt)
        while (tokens_found := engine.scheduler.check_lookup_result(request)) is None:
            pass
    engine.scheduler.end_session(request)
    return tokens_found


def main():
    binary, inline = sys.argv[1], "--inline" in sys.argv[2:]
    ports = {"red": free_port(), "blue": free_port()}
    with tempfile.TemporaryDirectory() as directory:
        server = start(binary, configuration(directory, ports), inline)
        engines = {}
        try:
            for name, port in ports.items():
                engines[name] = Engine(f"tcp://127.0.0.1:{port}")
            blocks = list(range(TOKENS // 16))
            cross, own = 0, 0
            for number, tokens in enumerate(prompts()):
                # Red stores; blue, with the same prompt and request names, finds nothing.
                fill(engines["red"], number)
                assert engines["red"].store(f"store-{number}", tokens, blocks)
                own += found(engines["red"], f"own-{number}", tokens) // TOKENS
                cross += found(engines["blue"], f"own-{number}", tokens)
            print(f"{PROMPTS} prompts stored by red: red finds {own}, blue finds {cross} tokens of them")
            assert own == PROMPTS and cross == 0

            forged = sum(
                found(engines["blue"], f"forged-{number}", tokens, SALTS["red"])
                for number, tokens in enumerate(prompts())
            )
            right = sum(
                found(engines["red"], f"right-{number}", tokens, SALTS["red"]) // TOKENS
                for number, tokens in enumerate(prompts())
            )
            print(f"red's salt, sent by blue: {forged} tokens; sent by red: {right} of {PROMPTS} prompts")
            assert forged == 0 and right == PROMPTS

            # Both store the same prompt, each with its own KV, and each gets its own back.
            tokens = prompts()[0]
            fill(engines["blue"], 1000)
            assert engines["blue"].store("store-blue", tokens, blocks)
            for name, seed in (("red", 0), ("blue", 1000)):
                engine = engines[name]
                fill(engine, seed)
                expected = {key: layer[:, blocks].clone() for key, layer in engine.kv.layers.items()}
                fill(engine, 5)
                assert engine.cached_tokens(f"load-{name}", tokens) == TOKENS
                assert engine.retrieve(f"load-{name}", tokens, blocks)
                engine.scheduler.end_session(f"load-{name}")
                for key, layer in engine.kv.layers.items():
                    assert torch.equal(layer[:, blocks], expected[key]), f"{name} got other bytes"
            print("the same prompt stored by both: each retrieves its own KV, bit for bit")
        finally:
            for engine in engines.values():
                engine.close()
            server.send_signal(signal.SIGTERM)
            server.wait(20)
            server.stderr.close()
    print("no cross hits")


main()
