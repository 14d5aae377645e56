#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A native plugin in Python: shows the server's settings, then a heartbeat until it is told to stop.

The server passes its settings as JSON in ``LMCACHE_RUNTIME_PLUGIN_CONFIG`` and makes each line
printed here one line of its log. It asks a plugin to stop with SIGTERM, and where the plugin runs
in a sandbox, which has no signals, with the end of standard input. The interval comes from
``--runtime-plugin-config '{"mp_plugin.heartbeat_seconds": 5}'``.
"""

import json
import os
import select
import signal
import socket
import sys

NAME = "mp_plugin"
DEFAULT_INTERVAL_SECONDS = 30.0
INTERVAL_RANGE_SECONDS = (0.1, 86400.0)
GIB = 1 << 30


def say(message):
    print(f"[{NAME}] {message}", flush=True)


def lookup(config, *path):
    """The value at ``path``, or None where the path ends early."""
    for name in path:
        if not isinstance(config, dict):
            return None
        config = config.get(name)
    return config


def show(value):
    """A value as JSON spells it, strings bare, and ``?`` for one that is not there."""
    if value is None:
        return "?"
    return value if isinstance(value, str) else json.dumps(value)


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def parse(text):
    """Returns (config, problem): an unusable text gives an empty config and a sentence."""
    if not text.strip():
        return {}, "LMCACHE_RUNTIME_PLUGIN_CONFIG is empty: nothing to show"
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        return {}, f"LMCACHE_RUNTIME_PLUGIN_CONFIG is not JSON: {error}"
    if not isinstance(config, dict):
        return {}, "LMCACHE_RUNTIME_PLUGIN_CONFIG is not a JSON object"
    return config, None


def summary(config):
    """The lines that describe the server, without the plugin's name in front."""
    mp = lookup(config, "mp_config")
    storage = lookup(config, "storage_manager_config")
    observability = lookup(config, "obs_config")
    size = lookup(storage, "l1_manager_config", "memory_config", "size_in_bytes")
    l1 = f"{size / GIB:.1f}" if is_number(size) else "?"
    return [
        f"MP server: host={show(lookup(mp, 'host'))} port={show(lookup(mp, 'port'))}"
        f" chunk_size={show(lookup(mp, 'chunk_size'))}",
        f"Storage: L1={l1}GB eviction={show(lookup(storage, 'eviction_config', 'eviction_policy'))}"
        f" watermark={show(lookup(storage, 'eviction_config', 'trigger_watermark'))}",
        f"Observability: enabled={show(lookup(observability, 'enabled'))}"
        f" metrics={show(lookup(observability, 'metrics_enabled'))}"
        f" tracing={show(lookup(observability, 'tracing_enabled'))}",
    ]


def interval(extra_text, config):
    """Returns (seconds, problem).

    LMCache's own server does not set ``LMCACHE_RUNTIME_PLUGIN_EXTRA_CONFIG``; there the same
    settings are a section of the main config.
    """
    extra = lookup(config, "runtime_plugin_extra_config")
    if extra_text.strip():
        try:
            extra = json.loads(extra_text)
        except (ValueError, RecursionError) as error:
            problem = f"LMCACHE_RUNTIME_PLUGIN_EXTRA_CONFIG is not JSON: {error}"
            return DEFAULT_INTERVAL_SECONDS, problem
    key = f"{NAME}.heartbeat_seconds"
    value = lookup(extra, key)
    if value is None:
        return DEFAULT_INTERVAL_SECONDS, None
    low, high = INTERVAL_RANGE_SECONDS
    if not is_number(value) or not low <= value <= high:
        problem = f"{key} is not a number from {low:g} to {high:g}: using {DEFAULT_INTERVAL_SECONDS:g}"
        return DEFAULT_INTERVAL_SECONDS, problem
    return float(value), None


def stop_request():
    """Something to ``select`` on, so that waiting for a heartbeat and for the end is one call.

    It gets one byte per SIGTERM or SIGINT; in a sandbox it is standard input, which ends.
    """
    if sys.platform == "wasi":
        return sys.stdin.buffer
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.detach(), warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    return reader.makefile("rb", buffering=0)


def name_of(request):
    """What asked us to stop: a signal's name, or the end of standard input."""
    return signal.Signals(request[0]).name if request else "the end of input"


def main():
    request = stop_request()
    say("Started")
    config, problem = parse(os.environ.get("LMCACHE_RUNTIME_PLUGIN_CONFIG", ""))
    if problem:
        say(f"WARNING: {problem}")
    for line in summary(config):
        say(line)
    seconds, problem = interval(os.environ.get("LMCACHE_RUNTIME_PLUGIN_EXTRA_CONFIG", ""), config)
    if problem:
        say(f"WARNING: {problem}")

    heartbeats = 0
    while True:
        say(f"heartbeat #{heartbeats}")
        heartbeats += 1
        if select.select([request], [], [], seconds)[0]:
            say(f"Received {name_of(request.read(1))}, exiting")
            return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BrokenPipeError:
        # Whoever read our lines is gone. Python would report the failed flush at exit once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
