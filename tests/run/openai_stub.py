"""A small OpenAI-compatible server that answers well or badly, and remembers what it was asked."""

import json
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fake_hf


class Tokenizer(fake_hf.WordTokenizer):
    """With a start token that may also stand in the text, and no chat template."""

    bos_token, chat_template = "<s>", None

    def __call__(self, text, add_special_tokens=True):
        bare = super().__call__(text.removeprefix("<s>"), add_special_tokens=False)
        bare.input_ids = [1] * (add_special_tokens + text.startswith("<s>")) + bare.input_ids
        return bare

    def decode(self, ids, skip_special_tokens=True, clean_up_tokenization_spaces=None):
        return super().decode(ids)


TOKENIZER = Tokenizer()


@dataclass
class Reply:
    """How one request is answered. ``change`` edits a good answer; ``cut``: the connection ends in the middle; ``wait_s`` before it begins."""

    status: int = 200
    body: bytes | None = None
    headers: dict = field(default_factory=dict)
    change: object = None
    cut: bool = False
    wait_s: float = 0.0
    reason: str | None = None


class Stub:
    """``with Stub() as server``: ``server.url``, ``server.asked`` (path, headers, body).

    A request gets what ``choose(body)`` gives for it, else one of ``replies``, which are used up, else ``always``, which is good at first.
    ``takes_ids`` False refuses token ids, as some servers do.
    """

    def __init__(self, takes_ids=True):
        self.asked, self.replies, self.always, self.takes_ids, self.choose = [], [], Reply(), takes_ids, lambda body: None
        self.version, self.models, self.busy, self.most_busy = "1.0", [{"id": "served", "owned_by": "stub", "created": 1}], 0, 0
        self.lock = threading.Lock()

    def __enter__(self):
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"stub": self}))
        self._http.daemon_threads = True
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        return self

    def __exit__(self, *_):
        self._http.shutdown()
        self._http.server_close()

    @property
    def prompts(self):
        """What was asked for by a run: all but the one token by which ``auto`` finds out."""
        return [body for _, _, body in self.asked if body["max_tokens"] > 1]

    def answer(self, path, body):
        """A good answer, as one who finds the key in the prompt gives it."""
        if "messages" in body:
            text = body["messages"][0]["content"]
            counted = 10 + len(TOKENIZER(text).input_ids)
        else:
            ids = body["prompt"] if isinstance(body["prompt"], list) else TOKENIZER(body["prompt"]).input_ids
            text, counted = TOKENIZER.decode(ids), len(ids)
        words = fake_hf.answer_to(text)
        made = TOKENIZER(words, add_special_tokens=False).input_ids[: body["max_tokens"]]
        finish = "length" if len(made) == body["max_tokens"] else "stop"
        said = (
            {"message": {"role": "assistant", "content": TOKENIZER.decode(made)}}
            if "messages" in body
            else {"text": TOKENIZER.decode(made)}
        )
        usage = {"prompt_tokens": counted, "completion_tokens": len(made), "total_tokens": counted + len(made)}
        return {"model": "served@1", "choices": [{"index": 0, "finish_reason": finish, **said}], "usage": usage}


class Handler(BaseHTTPRequestHandler):
    stub: Stub

    def do_GET(self):
        known = {"/v1/models": {"object": "list", "data": self.stub.models}, "/version": {"version": self.stub.version}}
        self.send(Reply() if self.path in known else Reply(404), json.dumps(known.get(self.path, {})).encode())

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.stub.lock:
            self.stub.asked.append((self.path, dict(self.headers), body))
            self.stub.busy += 1
            self.stub.most_busy = max(self.stub.busy, self.stub.most_busy)
            reply = self.stub.choose(body) or (self.stub.replies.pop(0) if self.stub.replies else self.stub.always)
        time.sleep(reply.wait_s)
        with self.stub.lock:
            self.stub.busy -= 1
        if isinstance(body.get("prompt"), list) and not self.stub.takes_ids:
            return self.send(Reply(400), b'{"detail":"prompt must be a string."}')
        told = self.stub.answer(self.path, body)
        if reply.change is not None:
            told = reply.change(told) or told
        self.send(reply, json.dumps(told).encode() if reply.body is None else reply.body)

    def send(self, reply, data):
        self.send_response(reply.status, reply.reason)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **reply.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        try:
            self.wfile.write(data[: len(data) // 2] if reply.cut else data)
        except OSError:  # whoever asked has gone
            pass
        self.close_connection = True

    def log_message(self, *_):
        pass
