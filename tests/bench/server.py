"""A Stockade server of a measurement: started on free ports, watched through /proc, ended with the block."""

import contextlib
import json
import os
import pathlib
import re
import subprocess
import tempfile
import time
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[2]


class Server:
    """Use as a context manager."""

    def __init__(self, program, *flags):
        self.program = str(program)
        self.scratch = tempfile.TemporaryDirectory(prefix="stockade-bench-")
        self.segment = f"stockade-bench-{os.getpid()}-{id(self)}"
        self.log_path = pathlib.Path(self.scratch.name, "log")
        command = [self.program, "serve", "--host", "127.0.0.1", "--port", "0", "--http-port", "0", "--shm-name", self.segment]
        command += ["--plugin-cache-dir", f"{self.scratch.name}/cache", *map(str, flags)]
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log)
        self.pid = self.process.pid

    def __enter__(self):
        try:
            line = self.wait_for_line(r"serving on .*")
            self.url = re.search(r"tcp://127\.0\.0\.1:\d+", line).group()
            self.http_url = re.search(r"http://127\.0\.0\.1:\d+", line).group()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        with contextlib.suppress(FileNotFoundError):
            pathlib.Path("/dev/shm", self.segment).unlink()
        self.scratch.cleanup()

    def log(self):
        return self.log_path.read_text(errors="replace")

    def wait_for_line(self, pattern, seconds=60):
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            found = re.search(pattern, self.log())
            if found:
                return found.group()
            if self.process.poll() is not None:
                break
            time.sleep(0.02)
        raise SystemExit(f"the server did not log {pattern}:\n{self.log()[-3000:]}")

    def text(self, path, method="GET"):
        request = urllib.request.Request(self.http_url + path, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read().decode()

    def http(self, path, method="GET"):
        return json.loads(self.text(path, method))

    def metric(self, name):
        """The sum of a metric's samples, whatever their labels."""
        samples = re.findall(rf"^{name}(?:{{.*}})? (\S+)$", self.text("/metrics"), re.M)
        return sum(map(float, samples))

    def steer(self, names, action, state):
        """Starts or stops plugins, and waits until all there are have the state."""
        for name in names:
            self.http(f"/v1/plugins/{name}/{action}", "POST")
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if all(plugin["state"] == state for plugin in self.http("/v1/plugins")["plugins"]):
                return
            time.sleep(0.05)
        raise SystemExit(f"the plugins did not become {state}")

    def l1(self):
        return self.http("/status")["storage_manager"]["l1_manager"]

    def sample(self):
        """Memory of its own in KiB without the pool, descriptors and threads."""
        status = pathlib.Path(f"/proc/{self.pid}/status").read_text()
        return {
            "rss_kib": int(re.search(r"RssAnon:\s+(\d+)", status).group(1)),
            "descriptors": len(os.listdir(f"/proc/{self.pid}/fd")),
            "threads": int(re.search(r"Threads:\s+(\d+)", status).group(1)),
        }

    def bench(self, *flags):
        """Rows of `stockade bench` against this server."""
        command = [self.program, "bench", "--json", "--url", self.url, *map(str, flags)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(command)}\n{done.stderr}\n{self.log()[-3000:]}")
        return json.loads(done.stdout)
