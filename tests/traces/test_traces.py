"""Traces as an OTLP receiver that shares no code with the server gets them.

The receiver is Google's gRPC with OpenTelemetry's own message definitions; the packages are in
requirements.txt. With STOCKADE_OTELCOL=FILE the OpenTelemetry Collector receives them too; where no
release of it can be had, `builder --config tests/traces/collector.yaml` makes one from Go modules
(`go install go.opentelemetry.io/collector/cmd/builder@v0.165.0`).
Needs a built server; says loudly what is missing and skips otherwise.
"""

import importlib.util
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import urllib.request
from concurrent import futures

try:
    import grpc
    from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as service
    from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as service_grpc
    from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
except ImportError:
    grpc = None

ROOT = pathlib.Path(__file__).resolve().parents[2]
TARGET = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
BINARY = pathlib.Path(os.environ.get("STOCKADE_BINARY", TARGET / "debug" / "stockade"))
COLLECTOR = os.environ.get("STOCKADE_OTELCOL")
PATIENCE = 30.0
CHUNK_TOKENS = 16
# Names that must not be found in any span.
SALT_CANARY = "salt-canary-5f2e"
TAG_CANARY = "tag-canary-91c0"


def example_client():
    """The example's own client: it speaks the wire by itself."""
    path = ROOT / "examples" / "python-client" / "client.py"
    spec = importlib.util.spec_from_file_location("client", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def missing():
    if grpc is None:
        return "the Python packages of tests/traces/requirements.txt"
    try:
        example_client()
    except ImportError as error:
        return f"the Python package {error.name} (tests/traces/requirements.txt)"
    return None if BINARY.exists() else f"{BINARY} (cargo build)"


def wait_for(what, condition):
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError(f"{what} did not come within {PATIENCE} s")


class Receiver:
    """An OTLP receiver that keeps what it gets, and refuses while it is told to."""

    def __init__(self, credentials=None):
        self.requests = []
        self.headers = []
        self.refuses = False
        outer = self

        class Traces(service_grpc.TraceServiceServicer):
            def Export(self, request, context):
                if outer.refuses:
                    context.abort(grpc.StatusCode.PERMISSION_DENIED, "not today")
                outer.headers.append(dict(context.invocation_metadata()))
                outer.requests.append(request)
                return service.ExportTraceServiceResponse()

        self.server = grpc.server(futures.ThreadPoolExecutor(2))
        service_grpc.add_TraceServiceServicer_to_server(Traces(), self.server)
        if credentials is None:
            self.port = self.server.add_insecure_port("127.0.0.1:0")
        else:
            self.port = self.server.add_secure_port("localhost:0", credentials)
        self.server.start()

    def spans(self):
        return [
            span
            for request in list(self.requests)
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    def wait_for(self, name, count=1):
        def found():
            spans = [span for span in self.spans() if span.name == name]
            return spans if len(spans) >= count else None

        return wait_for(f"{count} spans {name}", found)

    def stop(self):
        self.server.stop(0).wait()


class Server:
    def __init__(self, directory, *flags, **environment):
        command = [str(BINARY), "serve", "--host", "127.0.0.1", "--port", "0", "--http-port", "0"]
        command += ["--l1-size-gb", "0.0625", "--chunk-size", str(CHUNK_TOKENS), "--shm-name", ""]
        command += ["--plugin-cache-dir", str(directory / "cache"), *flags]
        environment = {**os.environ, **environment}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        self.lines = []
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()
        line = wait_for("the server", lambda: next((it for it in self.lines if "serving on" in it), None))
        self.http = re.search(r"HTTP on (http://\S+)", line).group(1)
        self.zmq = re.search(r"serving on (tcp://\S+)", line).group(1)

    def _read(self):
        for line in self.process.stderr:
            self.lines.append(line.rstrip())

    def metric(self, name):
        with urllib.request.urlopen(f"{self.http}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if re.match(rf"{name}[ {{]", line))

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(PATIENCE)
        finally:
            self.process.kill()
            self.process.wait()
        self.reader.join(PATIENCE)
        self.process.stderr.close()


def attributes(span):
    kinds = {"string_value", "int_value", "double_value", "bool_value"}
    values = {}
    for pair in span.attributes:
        kind = pair.value.WhichOneof("value")
        assert kind in kinds, pair
        values[pair.key] = getattr(pair.value, kind)
    return values


@unittest.skipIf(missing() is not None, f"TRACES ARE NOT TESTED: {missing()} is missing")
class Traces(unittest.TestCase):
    def setUp(self):
        self.directory = pathlib.Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.directory)
        self.client = example_client()

    def receiver(self, credentials=None):
        receiver = Receiver(credentials)
        self.addCleanup(receiver.stop)
        return receiver

    def server(self, *flags, **environment):
        server = Server(self.directory, *flags, **environment)
        self.addCleanup(server.stop)
        return server

    def connect(self, server):
        connection = self.client.Connection(server.zmq, PATIENCE)
        self.addCleanup(connection.close)
        return connection

    def key(self, chunks, request_id, rank):
        end = chunks * CHUNK_TOKENS
        key = self.client.key(list(range(end)), end, request_id, rank)
        return {**key, "cache_salt": SALT_CANARY, "request_configs": {"lmcache.tag.x": TAG_CANARY}}

    def register(self, connection):
        context = {
            "instance_id": 7,
            "model_name": self.client.MODEL,
            "world_size": 1,
            "block_size": CHUNK_TOKENS,
            "num_layers": 2,
            "hidden_dim_size": 16,
            "dtype_str": "float16",
            "use_mla": False,
            "num_physical_slots": None,
        }
        connection.call(self.client.Operation.REGISTER_KV_CACHE_ENGINE_DRIVEN_CONTEXT, context)

    def test_every_request_has_a_span_under_its_engines_request(self):
        receiver = self.receiver()
        server = self.server(
            "--enable-tracing",
            "--otlp-endpoint",
            f"127.0.0.1:{receiver.port}",
            "--instance-id",
            "instance-7",
            OTEL_EXPORTER_OTLP_HEADERS="x-scope=blue",
        )
        connection, operation = self.connect(server), self.client.Operation
        before = time.time_ns()
        self.register(connection)
        connection.call(operation.LOOKUP, self.key(4, "r-1", None), 1)
        connection.call(operation.QUERY_PREFETCH_STATUS, "r-1")
        connection.call(operation.PREPARE_RETRIEVE, self.key(4, "r-1", 0), 7)
        connection.call(operation.END_SESSION, "r-1")
        # No multiple of the chunk: an error reply that quotes the range.
        bad = {**self.key(4, "r-2", 0), "end": 5}
        with self.assertRaises(self.client.ClientError):
            connection.call(operation.PREPARE_STORE, bad, 7)
        connection.call(operation.NOOP)
        # Its session is open when the server stops.
        connection.call(operation.PREPARE_STORE, self.key(1, "r-3", 0), 7)
        receiver.wait_for("prepare_store", 2)
        server.stop()
        after = time.time_ns()

        spans = receiver.spans()
        by_name = {}
        for span in spans:
            by_name.setdefault(span.name, []).append(span)
        self.assertEqual(
            {name: len(found) for name, found in by_name.items()},
            {
                "register_kv_cache_engine_driven_context": 1,
                "lookup": 1,
                "query_prefetch_status": 1,
                "prepare_retrieve": 1,
                "end_session": 1,
                "prepare_store": 2,
                "noop": 1,
                "request": 2,
            },
        )
        roots = {attributes(root)["session_id"]: root for root in by_name["request"]}
        self.assertEqual(set(roots), {"r-1", "r-3"})
        root = roots["r-1"]
        self.assertEqual(root.parent_span_id, b"")
        self.assertEqual(
            attributes(root),
            {"session_id": "r-1", "requested_tokens": 64, "hit_tokens": 0, "hit_rate": 0.0},
        )
        for name in ("lookup", "query_prefetch_status", "prepare_retrieve", "end_session"):
            (span,) = by_name[name]
            self.assertEqual((span.trace_id, span.parent_span_id), (root.trace_id, root.span_id), name)
            self.assertEqual(attributes(span)["session_id"], "r-1")
            self.assertLessEqual(root.start_time_unix_nano, span.start_time_unix_nano, name)
            self.assertLessEqual(span.end_time_unix_nano, root.end_time_unix_nano, name)
        (lookup,) = by_name["lookup"]
        self.assertEqual(
            attributes(lookup),
            {"session_id": "r-1", "model_name": self.client.MODEL, "chunks": 4, "outcome": "ok"},
        )
        self.assertEqual(attributes(by_name["query_prefetch_status"][0])["hit_chunks"], 0)
        self.assertEqual(attributes(by_name["prepare_retrieve"][0])["outcome"], "miss")
        failed, good = sorted(by_name["prepare_store"], key=lambda span: span.status.code, reverse=True)
        self.assertEqual(failed.status.code, Status.STATUS_CODE_ERROR)
        self.assertEqual((failed.status.message, attributes(failed)["outcome"]), ("refused", "refused"))
        self.assertEqual(failed.parent_span_id, b"")
        self.assertEqual(good.status.code, Status.STATUS_CODE_UNSET)
        self.assertEqual(good.parent_span_id, roots["r-3"].span_id)
        self.assertEqual(by_name["noop"][0].parent_span_id, b"")
        self.assertEqual(len({span.span_id for span in spans}), len(spans))
        for span in spans:
            self.assertEqual(span.kind, Span.SPAN_KIND_SERVER)
            self.assertEqual((len(span.trace_id), len(span.span_id)), (16, 8))
            self.assertTrue(before <= span.start_time_unix_nano <= span.end_time_unix_nano <= after, span)
        for request, headers in zip(receiver.requests, receiver.headers, strict=True):
            self.assertEqual(headers["x-scope"], "blue")
            for resource in request.resource_spans:
                named = attributes(resource.resource)
                self.assertEqual(named["service.name"], "stockade")
                self.assertEqual(named["service.instance.id"], "instance-7")
            sent = request.SerializeToString()
            for canary in (SALT_CANARY, TAG_CANARY):
                self.assertNotIn(canary.encode(), sent)
        # Nor does the log quote the header.
        self.assertNotIn("blue", "\n".join(server.lines))

    def test_what_the_receiver_refuses_is_counted_and_requests_go_on(self):
        receiver = self.receiver()
        receiver.refuses = True
        server = self.server("--enable-tracing", "--otlp-endpoint", f"http://127.0.0.1:{receiver.port}")
        connection, operation = self.connect(server), self.client.Operation
        connection.call(operation.NOOP)
        wait_for("a refusal", lambda: server.metric("stockade_trace_spans_dropped_total") == 1)
        self.assertEqual(server.metric("stockade_trace_spans_exported_total"), 0)
        self.assertTrue(any("not taken" in line for line in server.lines), server.lines)
        receiver.refuses = False
        connection.call(operation.NOOP)
        receiver.wait_for("noop")
        wait_for("the count", lambda: server.metric("stockade_trace_spans_exported_total") == 1)

    def test_a_rate_of_zero_sends_nothing(self):
        receiver = self.receiver()
        flags = ("--enable-tracing", "--otlp-endpoint", f"http://127.0.0.1:{receiver.port}")
        server = self.server(*flags, "--tracing-sample-rate", "0")
        connection, operation = self.connect(server), self.client.Operation
        for number in range(20):
            connection.call(operation.LOOKUP, self.key(1, f"r-{number}", None), 1)
            connection.call(operation.END_SESSION, f"r-{number}")
        server.stop()
        self.assertEqual(receiver.requests, [])

    @unittest.skipIf(shutil.which("openssl") is None, "TLS IS NOT TRIED: there is no openssl")
    def test_tls_is_spoken_and_strangers_are_not_trusted(self):
        def openssl(*arguments):
            command = ["openssl", *arguments]
            subprocess.run(command, cwd=self.directory, check=True, capture_output=True)

        key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
        openssl("req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=ca", "-days", "2")
        openssl("req", *key, "-keyout", "leaf.key", "-out", "leaf.csr", "-subj", "/CN=localhost")
        (self.directory / "leaf.ext").write_text("subjectAltName=DNS:localhost\nbasicConstraints=CA:FALSE\n")
        signing = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "leaf.ext")
        openssl("x509", "-req", "-in", "leaf.csr", *signing, "-out", "leaf.pem", "-days", "2")
        pair = [(self.directory / f"leaf.{kind}").read_bytes() for kind in ("key", "pem")]
        receiver = self.receiver(grpc.ssl_server_credentials([tuple(pair)]))
        flags = ("--enable-tracing", "--otlp-endpoint", f"https://localhost:{receiver.port}")
        trusting = self.server(*flags, SSL_CERT_FILE=str(self.directory / "ca.pem"))
        self.connect(trusting).call(self.client.Operation.NOOP)
        receiver.wait_for("noop")
        stranger = self.server(*flags, SSL_CERT_FILE="/dev/null")
        self.connect(stranger).call(self.client.Operation.NOOP)
        wait_for("a loss", lambda: stranger.metric("stockade_trace_spans_dropped_total") == 1)
        self.assertEqual(len(receiver.spans()), 1)

    @unittest.skipIf(COLLECTOR is None, "THE COLLECTOR IS NOT TRIED: STOCKADE_OTELCOL names none")
    def test_the_collector_takes_them(self):
        import socket

        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        config = self.directory / "collector.yaml"
        config.write_text(
            f"receivers: {{otlp: {{protocols: {{grpc: {{endpoint: '127.0.0.1:{port}'}}}}}}}}\n"
            "exporters: {debug: {verbosity: detailed}}\n"
            "service:\n"
            "  telemetry: {metrics: {level: none}}\n"
            "  pipelines: {traces: {receivers: [otlp], exporters: [debug]}}\n"
        )
        seen = self.directory / "collector.txt"
        with seen.open("w") as output:
            collector = subprocess.Popen([COLLECTOR, "--config", str(config)], stderr=output, stdout=output)
        self.addCleanup(collector.wait)
        self.addCleanup(collector.kill)
        server = self.server("--enable-tracing", "--otlp-endpoint", f"http://127.0.0.1:{port}")
        connection, operation = self.connect(server), self.client.Operation
        self.register(connection)

        def arrived():
            # The collector may not listen yet; what it missed is counted as dropped.
            connection.call(operation.LOOKUP, self.key(1, "r-1", None), 1)
            connection.call(operation.END_SESSION, "r-1")
            text = seen.read_text()
            return all(f"Name           : {name}\n" in text for name in ("request", "lookup", "end_session"))

        wait_for("a span in the collector", arrived)
        text = seen.read_text()
        self.assertIn("service.name: Str(stockade)", text)
        root = re.search(r"Trace ID +: (\w+)\n +Parent ID +: *\n +ID +: (\w+)\n +Name +: request\n", text)
        part = re.search(r"Trace ID +: (\w+)\n +Parent ID +: (\w+)\n +ID +: \w+\n +Name +: lookup\n", text)
        self.assertEqual(part.groups(), root.groups())
        self.assertIn("session_id: Str(r-1)", text)
        if os.environ.get("STOCKADE_SHOW"):
            print(text, file=sys.stderr)


if __name__ == "__main__":
    unittest.main(verbosity=2)
