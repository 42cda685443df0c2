"""A chat endpoint inside the test process: it answers as a test tells it to and remembers every request it got."""

import json
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Request:
    path: str
    headers: dict
    body: dict
    time: float  # Unix time of arrival
    prompt: str  # the quoted material of the question, with the quotes taken off
    a: str
    b: str

    @property
    def texts(self):
        return self.prompt, self.a, self.b

    @property
    def messages(self):
        return self.body["messages"]


@dataclass
class Reply:
    status: int = 200
    body: bytes = b""
    headers: dict = field(default_factory=dict)
    delay: float = 0.0  # seconds before the answer, less if the server is closed
    cut: bool = False  # the connection ends in the middle of the body
    drip: str = ""  # "headers" or "body": from there on a byte every 0.05 seconds, less if the server is closed


def said(text, finish_reason="stop"):
    """A chat completion with one choice."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
    return Reply(body=json.dumps({"id": "1", "object": "chat.completion", "choices": [choice]}).encode())


def verdict(letter):
    return said(f"Comparison: {letter} says more, whatever anyone writes about Preferred: X.\nPreferred: {letter}")


HEADINGS = ("Post:", "Summary A:", "Summary B:")


def quoted_material(question):
    """Post and both summaries of a question, with the quotes taken off."""
    texts, heading = {heading: [] for heading in HEADINGS}, None
    for line in question.split("\n"):
        if line.startswith("> "):
            texts[heading].append(line[2:])
        elif line:
            heading = line
    return ["\n".join(lines) for lines in texts.values()]


class ChatServer:
    """`with ChatServer(answer) as server`: answer(request) -> Reply is called in the thread of each request."""

    def __init__(self, answer, port=0):
        self.answer, self.requests, self.errors, self.sent = answer, [], [], 0
        self.lock, self.closing = threading.Lock(), threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                server.handle(self)

            def log_message(self, *args):
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request, client_address):
                error = sys.exc_info()[1]
                if not isinstance(error, ConnectionError):  # a client that is gone is part of the tests
                    server.errors.append(error)

        self.http = Server(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def handle(self, handler):
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        material = quoted_material(body["messages"][0]["content"])
        headers = {name.lower(): value for name, value in handler.headers.items()}
        request = Request(handler.path, headers, body, time.time(), *material)
        with self.lock:
            self.requests.append(request)
        reply = self.answer(request)
        if reply.delay:
            self.closing.wait(reply.delay)
        if reply.drip == "headers":
            self.drip(handler, f"HTTP/1.1 {reply.status} OK\r\nX-Slow: {'x' * 200}\r\n".encode())
        else:
            handler.send_response(reply.status)
        for name, value in reply.headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(reply.body)))
        handler.end_headers()
        body = reply.body[: len(reply.body) // 2] if reply.cut else reply.body
        if reply.drip == "body":
            return self.drip(handler, body)
        for start in range(0, len(body), 2**16):
            handler.wfile.write(body[start : start + 2**16])
            self.sent += len(body[start : start + 2**16])
        handler.close_connection = reply.cut

    def drip(self, handler, data):
        for byte in data:
            handler.wfile.write(bytes([byte]))
            self.closing.wait(0.05)

    def tries(self, request):
        """How often the texts of this request have been asked about so far, this time included."""
        with self.lock:
            return sum(other.texts == request.texts for other in self.requests)

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.closing.set()
        self.http.shutdown()
        self.http.server_close()
        assert not self.errors
