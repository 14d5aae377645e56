"""Pages of docs/plugins as what they say: files, commands, and what these show."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PATIENCE_SECONDS = 120

BLOCK = re.compile(
    r"<!-- (file: (?P<file>\S+)|run|shows|serve) -->\n```(?P<language>\w+)\n(?P<text>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)


def blocks(page):
    """The marked blocks of a page in order: (file name or kind, text)."""
    for match in BLOCK.finditer(page.read_text()):
        kind = match["file"] or match[0].split("-->")[0].removeprefix("<!--").strip()
        yield kind, match["text"], bool(match["file"])


def binary():
    """The server that was built last, or None."""
    target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    built = [target / profile / "stockade" for profile in ("debug", "release")]
    built = [path for path in built if path.exists()]
    return max(built, key=lambda path: path.stat().st_mtime, default=None)


def compiler(language):
    """Whether the compiler for a language's modules is there."""
    script = ROOT / "plugin-sdk/toolchain.sh"
    folder = Path(subprocess.check_output([script, "--bin"], text=True).strip())
    return (folder / {"rust": "wasm-cargo", "go": "wasm-go"}[language]).exists()


class Server:
    """A server on ports of its own, until the end of a `with`."""

    def __init__(self, command, directory, environment=()):
        self.log = Path(directory) / "server.log"
        self.environment = {
            **os.environ,
            "STOCKADE_PORT": "0",
            "STOCKADE_HTTP_PORT": "0",
            "STOCKADE_PLUGIN_CACHE_DIR": str(Path(directory) / "compiled"),
            **dict(environment),
        }
        self.command, self.directory = command, directory

    def __enter__(self):
        with open(self.log, "w") as output:
            self.process = subprocess.Popen(
                self.command,
                cwd=self.directory,
                env=self.environment,
                stderr=output,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )
        try:
            serving = self.wait_for(r"serving on tcp://([^ ]+) with HTTP on (\S+)")
        except BaseException:
            self.__exit__()
            raise
        self.zmq, self.http = serving[1], serving[2]
        return self

    def text(self):
        return self.log.read_text(errors="replace")

    def wait_for(self, pattern, after=0):
        """The match of a pattern in the log from a place on, once it is there."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            found = re.compile(pattern).search(self.text(), after)
            if found:
                return found
            if self.process.poll() is not None:
                raise AssertionError(f"the server ended:\n{self.text()}")
            if time.monotonic() > deadline:
                raise AssertionError(f"no {pattern!r} in the log:\n{self.text()}")
            time.sleep(0.02)

    def stop(self):
        """Ends the server as an operator does; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=60)

    def __exit__(self, *_):
        if self.process.poll() is None:
            # A session of its own, so that a shell around it goes too.
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def play(page, directory, prepare=lambda kind, text: text):
    """Does what a page says, in a directory.

    Commands run in one shell each, but a `cd` of one holds for the next, as it does for a reader.
    Raises AssertionError with all output where a command fails or does not show what it should.
    """
    here = Path(directory)
    output, server, ran = "", None, 0
    tools = here / "bin"
    tools.mkdir()
    (tools / "stockade").symlink_to(binary())
    place = here / ".place"
    environment = {
        **os.environ,
        "PAGE_PLACE": str(place),
        "PATH": f"{tools}:{os.environ['PATH']}",
        "CARGO_TARGET_DIR": str(ROOT / "target/pages"),
    }
    try:
        for kind, text, is_file in blocks(page):
            text = prepare(kind, text)
            if is_file:
                path = Path(directory) / kind
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
            elif kind == "run":
                ran += 1
                done = subprocess.run(
                    ["bash", "-euo", "pipefail", "-c", text + "\npwd > \"$PAGE_PLACE\""],
                    cwd=here,
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    timeout=2 * PATIENCE_SECONDS,
                )
                output = done.stdout
                if done.returncode != 0:
                    raise AssertionError(f"{page.name}: {text}\nended with {done.returncode}:\n{output}")
                here = Path(place.read_text().strip())
            elif kind == "serve":
                command = ["bash", "-euo", "pipefail", "-c", "exec " + text]
                server = Server(command, here, {"PATH": environment["PATH"]})
                server.__enter__()
                environment["STOCKADE_SERVER"] = server.http
                # What the page shows next was said once the plugins had started.
                server.wait_for(r"INFO: \[\w+\] ")
            else:
                rest = output
                for line in text.splitlines():
                    if line not in rest:
                        raise AssertionError(f"{page.name}: there is no {line!r} in\n{output}")
                    rest = rest[rest.index(line) + len(line) :]
        return ran
    finally:
        if server is not None:
            code = server.stop() if server.process.poll() is None else server.process.returncode
            server.__exit__()
            if code != 0:
                print(f"{page.name}: the server ended with {code}:\n{server.text()}", file=sys.stderr)
