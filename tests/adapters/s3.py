"""A local S3: moto's server in a thread, and before it a gate that can fail requests or forget their conditions."""

import http.client
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest
from moto.server import ThreadedMotoServer


@dataclass
class S3:
    """A service of one's own; it can be busy, as `fail_next` says how often, deny access, and forget conditions."""

    url: str
    fail_next: int = 0
    denies: bool = False
    forgets_conditions: bool = False
    requests: list[str] = field(default_factory=list)

    def make_bucket(self, name: str) -> str:
        with urllib.request.urlopen(urllib.request.Request(f"{self.url}/{name}", method="PUT"), timeout=120):
            return name


@contextmanager
def s3_service() -> Iterator[S3]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    service = S3("")
    gate = ThreadingHTTPServer(("127.0.0.1", 0), _gate(service, f"{host}:{port}"))
    thread = threading.Thread(target=gate.serve_forever)
    thread.start()
    service.url = f"http://127.0.0.1:{gate.server_address[1]}"
    try:
        yield service
    finally:
        gate.shutdown()
        gate.server_close()
        thread.join()
        server.stop()


def use(service: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    """What tells the client library of a service: the environment, as it is for users."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", service.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_REGION", "us-east-1")


def _gate(service: S3, address: str) -> type[BaseHTTPRequestHandler]:
    class Gate(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            service.requests.append(f"{self.command} {urlsplit(self.path).path}")
            if service.fail_next > 0:
                service.fail_next -= 1
                self.answer(503, {}, b"<Error><Code>SlowDown</Code></Error>")
                return
            if service.denies:
                self.answer(403, {}, b"<Error><Code>AccessDenied</Code></Error>")
                return
            dropped = {"host", "connection"} | ({"if-match", "if-none-match"} if service.forgets_conditions else set())
            headers = {name: value for name, value in self.headers.items() if name.lower() not in dropped}
            connection = http.client.HTTPConnection(address, timeout=120)
            try:
                connection.request(self.command, self.path, body, headers)
                answer = connection.getresponse()
                content = answer.read()
            finally:
                connection.close()
            length = {"content-length": answer.headers.get("content-length", "0")} if self.command == "HEAD" else {}
            kept = {n: v for n, v in answer.headers.items() if n.lower() in ("etag", "last-modified", "content-range")}
            self.answer(answer.status, kept | length, content)

        def answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
            self.send_response(status)
            for name, value in ({"content-length": str(len(content))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = forward

        def log_message(self, *_: object) -> None:
            """Tests read `requests`."""

    return Gate
