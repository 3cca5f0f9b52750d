"""A small HTTP server that serves files well or badly, and remembers what it was asked for."""

import hashlib
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from hipexp.suites.data.registry import DataFile, Source

REVISION = "0123456789abcdef0123456789abcdef01234567"
SOURCE = Source("hub", "somebody/data", REVISION, "none")


def sha256_of(body):
    return hashlib.sha256(body).hexdigest()


def toy(body, name="passkey.jsonl", pinned=True, **more):
    """A registry entry for ``body``, served as ``DataServer`` addresses it."""
    settings = {"sha256": sha256_of(body) if pinned else None, "exact": pinned, "subtasks": ("passkey",)}
    return DataFile("infbench", name, SOURCE, name, len(body), **(settings | more))


@dataclass
class Served:
    """How one address answers. Each entry of ``cuts`` ends one answer after so many bytes; ``gate`` makes it wait after ``gate_at``."""

    body: bytes
    ranges: bool = True
    says_length: bool = True
    status: list[int] = field(default_factory=list)
    cuts: list[int] = field(default_factory=list)
    gate_at: int | None = None
    gate: threading.Event = field(default_factory=threading.Event)
    wrong_range: bool = False
    redirect: str | None = None
    linked: str | None = None


class DataServer:
    """``with DataServer() as server``: set ``server.files[path]``, read ``server.asked`` (path, Range)."""

    def __init__(self):
        self.files, self.asked = {}, []

    def __enter__(self):
        handler = type("Handler", (Handler,), {"files": self.files, "asked": self.asked})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._http.daemon_threads = True
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_):
        for served in self.files.values():
            served.gate.set()
        self._http.shutdown()
        self._http.server_close()

    @property
    def hosts(self):
        """What to put in place of the registry's hosts."""
        return dict.fromkeys(("hub", "github", "github-lfs", "squad"), f"http://127.0.0.1:{self._http.server_port}/{{path}}")

    def serve(self, file, body, **how):
        served = self.files[f"/{file.path}"] = Served(body, **how)
        return served

    def ranges(self, file):
        """The Range header of each request for a file, None where there was none."""
        return [asked for path, asked in self.asked if path == f"/{file.path}"]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    files: dict
    asked: list

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.close_connection = True
        asked = self.headers.get("Range")
        self.asked.append((self.path, asked))
        served = self.files.get(self.path)
        status = 404 if served is None else served.status.pop(0) if served.status else 200
        if served is not None and served.redirect:
            return self._head(302, {"Location": served.redirect, "Content-Length": "0", "X-Linked-Etag": f'"{served.linked}"'})
        if status != 200:
            return self._head(status, {"Content-Length": "0"})
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and served.ranges else 0
        start += 10 if start and served.wrong_range else 0
        size = len(served.body)
        if start and start >= size:
            return self._head(416, {"Content-Range": f"bytes */{size}", "Content-Length": "0"})
        headers = {"Content-Length": str(size - start)} if served.says_length else {}
        if start:
            headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
        self._head(206 if start else 200, headers | {"Connection": "close"})
        self._send(served, served.body[start:])

    def _head(self, status, headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _send(self, served, body):
        if served.cuts:
            body = body[: served.cuts.pop(0)]
        if served.gate_at is not None:
            self.wfile.write(body[: served.gate_at])
            self.wfile.flush()
            served.gate.wait(30)
            body = body[served.gate_at :]
        self.wfile.write(body)
