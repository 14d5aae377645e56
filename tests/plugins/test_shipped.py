#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The plugins of plugins/, each in a real server beside what it talks to.

It needs a built server, the modules that plugin-sdk/build.sh builds, and for the uploader moto
(tests/plugins/requirements.txt); what is missing is said.
"""

import http.server
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import urllib.parse
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import pages

try:
    import boto3
    from moto.core import set_initial_no_auth_action_count
    from moto.server import ThreadedMotoServer
except ImportError:
    boto3 = None

MODULES = pages.ROOT / "target/plugins"


class Shipped(unittest.TestCase):
    def setUp(self):
        if pages.binary() is None:
            self.skipTest("there is no built server: cargo build")
        self.directory = Path(tempfile.mkdtemp(prefix="stockade-shipped-"))
        self.addCleanup(shutil.rmtree, self.directory, ignore_errors=True)
        self.plugins = self.directory / "plugins"
        self.plugins.mkdir()

    def install(self, name, *changes):
        """Copies a plugin, with its manifest changed as an operator would; each change must fit."""
        if not (MODULES / f"{name}.wasm").exists():
            self.skipTest(f"there is no {name}.wasm: plugin-sdk/build.sh")
        shutil.copy(MODULES / f"{name}.wasm", self.plugins)
        manifest = (MODULES / f"{name}.plugin.toml").read_text()
        for old, new in changes:
            self.assertIn(old, manifest)
            manifest = manifest.replace(old, new)
        (self.plugins / f"{name}.plugin.toml").write_text(manifest)

    def server(self, settings, *flags, environment=(), config=None):
        command = [pages.binary(), "serve", "--l1-size-gb", "0.0625"]
        if config is not None:
            path = self.directory / "stockade.toml"
            path.write_text(config)
            command += ["--config", path]
        command += ["--runtime-plugin-config", json.dumps(settings)]
        command += ["--runtime-plugin-locations", self.plugins, *flags]
        return pages.Server(command, self.directory, environment)

    def wait(self, what, condition):
        deadline = time.monotonic() + pages.PATIENCE_SECONDS
        while True:
            found = condition()
            if found:
                return found
            if time.monotonic() > deadline:
                self.fail(f"{what} did not come")
            time.sleep(0.05)

    def metric(self, server, plugin, name, kind="total"):
        """A value that a plugin counts, 0 where it has not."""
        with urllib.request.urlopen(f"{server.http}/metrics") as response:
            text = response.read().decode()
        for line in text.splitlines():
            if (
                line.startswith(f"stockade_plugin_custom_{kind}{{")
                and f'"{plugin}"' in line
                and f'"{name}"' in line
            ):
                return float(line.rsplit(" ", 1)[1])
        return 0.0

    def test_heartbeat_reaches_a_discovery_service_and_survives_its_failures(self):
        asked, statuses = [], [500]

        class Discovery(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                asked.append(self.path)
                self.send_response(statuses.pop() if statuses else 200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_):
                pass

        service = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Discovery)
        threading.Thread(target=service.serve_forever, daemon=True).start()
        self.addCleanup(service.server_close)
        self.addCleanup(service.shutdown)
        port = service.server_port
        self.install(
            "discovery_heartbeat",
            ('"discovery.example.com"', '"127.0.0.1"'),
            ("port = 80", f"port = {port}"),
        )
        settings = {
            "plugin.frontend.heartbeat_url": f"http://127.0.0.1:{port}/heartbeat",
            "plugin.frontend.heartbeat_interval": 1,
        }
        with self.server(settings) as server:
            self.wait("three heartbeats", lambda: len(asked) >= 3)
            self.wait("their count", lambda: self.metric(server, "discovery_heartbeat", "heartbeats") >= 2)
            self.assertEqual(self.metric(server, "discovery_heartbeat", "heartbeat_failures"), 1)
            self.assertEqual(server.stop(), 0)
            log = server.text()
        path, query = asked[0].split("?")
        query = dict(urllib.parse.parse_qsl(query, strict_parsing=True))
        self.assertEqual(path, "/heartbeat")
        self.assertEqual(query["api_address"], server.http)
        self.assertIn("startup_time", json.loads(query["other_info"]))
        self.assertTrue(query["pid"].isdigit())
        self.assertIn("heartbeat failed 1 times: the discovery service answered 500", log)
        self.assertIn("the discovery service is back after 1 failures", log)

    def test_heartbeat_is_denied_another_host(self):
        self.install("discovery_heartbeat")
        settings = {"plugin.frontend.heartbeat_url": "http://127.0.0.1:9/heartbeat"}
        with self.server(settings) as server:
            line = server.wait_for(r"heartbeat failed 1 times: .*")[0]
            self.assertIn("[[http]]", line)

    def test_uploader_ships_what_the_server_logs(self):
        if boto3 is None:
            self.skipTest("there is no moto: tests/plugins/requirements.txt")
        store = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        store.start()
        self.addCleanup(store.stop)
        host, port = store.get_host_and_port()
        url = f"http://{host}:{port}"

        def client(service, key, secret):
            return boto3.client(
                service,
                endpoint_url=url,
                region_name="us-east-1",
                aws_access_key_id=key,
                aws_secret_access_key=secret,
            )

        admin = client("iam", "admin", "admin")
        admin.create_user(UserName="uploader")
        key = admin.create_access_key(UserName="uploader")["AccessKey"]
        allow = {"Effect": "Allow", "Action": "s3:*", "Resource": "*"}
        policy = json.dumps({"Version": "2012-10-17", "Statement": [allow]})
        admin.put_user_policy(UserName="uploader", PolicyName="all", PolicyDocument=policy)
        client("s3", "admin", "admin").create_bucket(Bucket="hashes")
        bucket = client("s3", key["AccessKeyId"], key["SecretAccessKey"])

        logs = self.directory / "logs"
        logs.mkdir()
        self.install(
            "chunk_hash_uploader",
            ('"s3.example.com"', f'"{host}"'),
            ("port = 443", f"port = {port}"),
            ('"/var/lib/stockade/lookup-hashes"', json.dumps(str(logs))),
        )
        settings = {
            "chunk_hash_uploader.url": f"{url}/hashes/of%20this/server",
            "chunk_hash_uploader.seconds": 0.5,
        }
        environment = {
            "AWS_ACCESS_KEY_ID": key["AccessKeyId"],
            "AWS_SECRET_ACCESS_KEY": "wrong",
        }
        flags = ["--lookup-hash-log-dir", logs, "--lookup-hash-log-rotation-max-size", "20000"]
        # From here on moto checks who asks, and the signature.
        @set_initial_no_auth_action_count(0)
        def ship():
            with self.server(settings, *flags, environment=environment) as server:
                command = [pages.binary(), "bench", "--url", f"tcp://{server.zmq}", "--json"]
                command += ["--workload", "lookup-miss", "--seconds", "1", "--tokens", "4096"]
                load = subprocess.run(command, capture_output=True, text=True)
                self.assertEqual(load.returncode, 0, load.stderr)
                server.wait_for(r"the store answered 403: .*SignatureDoesNotMatch")
                self.assertEqual(server.stop(), 0)
            self.assertFalse((logs / "archive").exists() and os.listdir(logs / "archive"))
            written = {path.name: path.read_bytes() for path in logs.glob("*.jsonl")}
            self.assertGreater(len(written), 2)
            environment["AWS_SECRET_ACCESS_KEY"] = key["SecretAccessKey"]
            with self.server(settings, *flags, environment=environment) as server:
                # The newest file is left alone: this server may have continued none of them.
                newest = max(written)
                whole = set(written) - {newest}
                self.wait(
                    "the archive",
                    lambda: whole <= set(os.listdir(logs / "archive")),
                )
                uploaded = self.metric(server, "chunk_hash_uploader", "files_uploaded")
                self.assertEqual(uploaded, len(whole))
                self.assertEqual(server.stop(), 0)
            for name in whole:
                stored = bucket.get_object(Bucket="hashes", Key=f"of this/server/{name}")
                self.assertEqual(stored["Body"].read(), written[name])
            self.assertEqual({path.name for path in logs.glob("*.jsonl")}, {newest})

        ship()

    def test_tenant_usage_writes_reports(self):
        reports = self.directory / "reports"
        reports.mkdir()
        self.install(
            "tenant_usage",
            ('"/var/lib/stockade/usage"', json.dumps(str(reports))),
        )
        config = '[tenants.alice]\nsalts = ["a"]\nfloor_gb = 0.01\n'
        settings = {"tenant_usage.sample_seconds": 0.1, "tenant_usage.report_seconds": 0.3}
        with self.server(settings, config=config) as server:
            prom = reports / "stockade_tenants.prom"
            self.wait("a report", prom.exists)
            text = prom.read_text()
            self.assertRegex(text, r'stockade_tenant_report_floor_bytes\{tenant="alice"\} 1073\d+')
            self.assertRegex(text, r'stockade_tenant_report_used_bytes\{tenant="alice"\} 0\n')
            self.assertEqual(server.stop(), 0)
        (lines,) = [path.read_text().splitlines() for path in reports.glob("usage-*.jsonl")]
        self.assertIn("alice", json.loads(lines[-1])["tenants"])

    def test_session_aware_eviction_is_told_what_is_finished(self):
        self.install("session_aware_eviction")
        with self.server({}) as server:
            server.wait_for(r"ranking by idle time")

            def call(method, body):
                url = f"{server.http}/v1/plugins/session_aware_eviction/call/{method}"
                request = urllib.request.Request(url, data=body, method="POST")
                with urllib.request.urlopen(request) as response:
                    return response.read()

            call("finished", b'["r1", "r2"]')
            report = json.loads(call("report", b""))
            self.assertEqual(report["finished"], 2)
            self.assertEqual(self.metric(server, "session_aware_eviction", "finished_requests", "gauge"), 2)


if __name__ == "__main__":
    unittest.main()
