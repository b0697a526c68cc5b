"""Serves an ONNX artifact to a browser, a phone's too, which classifies pictures and is a judge; needs Python alone.

    npm install onnxruntime-web@1.30.0               once, or: python -m edgekit.processors wasm
    python serve.py ARTIFACT                         prints a link; open it in the browser that shall judge
    edgekit verify … --judge tcp://127.0.0.1:PORT    the address that is printed once the page is open

The link opens once: the browser that opened it keeps a cookie, every other one is refused. Both ports are loopback's
unless `--listen HOST:PORT` or `--judge HOST:PORT` say otherwise; nothing is encrypted.
"""

import argparse
import base64
import contextlib
import hashlib
import hmac
import http.server
import json
import math
import os
import queue
import secrets
import socket
import socketserver
import struct
import sys
import threading
import urllib.parse
from pathlib import Path

HERE = Path(__file__).resolve().parent
LIBRARY = "ort.wasm.bundle.min.mjs"
ORT = (LIBRARY, "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
PAGE = {"/": ("index.html", "text/html; charset=utf-8"), "/page.js": ("page.js", "text/javascript; charset=utf-8")}
ANNOUNCED = 2**30  # bytes that one request of the protocol may announce
AT_ONCE = 2**22  # bytes of pixels that the page gets in one message: a phone's memory is small
MESSAGE = 2**26  # bytes of one message that are taken from the page
SECONDS = 600  # that a page may take to answer one message
_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, section 1.3
_CONTINUED, _TEXT, _BINARY, _CLOSE, _PING, _PONG = 0, 1, 2, 8, 9, 10


class Fault(Exception):
    """One sentence for the user, and the exit status that goes with it."""

    def __init__(self, what, status=2):
        super().__init__(what)
        self.status = status


class Gone(Exception):
    """The page went away."""


class WebSocket:
    """A connection to the page after its handshake: whole messages, as RFC 6455 frames them."""

    def __init__(self, reader, wire):
        self.reader, self.wire, self.sending = reader, wire, threading.Lock()

    def send(self, data, kind=_BINARY):
        size = len(data)
        length = (
            bytes([size]) if size < 126 else struct.pack(">BH" if size < 2**16 else ">BQ", 126 + (size > 65535), size)
        )
        try:
            with self.sending:
                self.wire.sendall(bytes([0x80 | kind]) + length + data)
        except OSError:
            raise Gone from None

    def receive(self):
        """(whether it is text, its bytes) of the next message.

        Raises:
            Gone: the page has closed, or sends what is no message.
        """
        kind, whole = None, b""
        while True:
            first, second = self._take(2)
            code, final, size = first & 15, first & 128, second & 127
            if size > 125:
                size = int.from_bytes(self._take(2 if size == 126 else 8), "big")
            if not second & 128 or first & 0x70 or len(whole) + size > MESSAGE:  # what a browser sends is masked
                raise Gone
            mask = self._take(4) * (-(-size // 4))
            data = int.from_bytes(self._take(size), "big") ^ int.from_bytes(mask[:size], "big")
            data = data.to_bytes(size, "big")
            if code == _CLOSE:
                raise Gone
            if code == _PING:
                self.send(data, _PONG)
            elif code != _PONG:
                kind = code if code != _CONTINUED else kind
                whole += data
                if final:
                    return kind == _TEXT, whole

    def _take(self, count):
        try:
            data = self.reader.read(count)
        except OSError:
            raise Gone from None
        if len(data) < count:
            raise Gone
        return data


class Page:
    """The page that is open now, as a judge; a newer one takes its place."""

    def __init__(self):
        self.turn = threading.Lock()
        self.open = None  # (WebSocket, the queue of its answers)

    def stay(self, connection):
        """Pass on what the page answers until it goes away."""
        before, answers = self.open, queue.Queue()
        self.open = connection, answers
        if before:
            before[1].put(None)  # who waits for the older page waits in vain
        try:
            while True:
                answers.put(connection.receive())
        except Gone:
            answers.put(None)
            if self.open == (connection, answers):
                self.open = None

    def ask(self, shape, pixels):
        """Bytes of float32 pixels -> (K, bytes of float32 scores); few images at a time.

        Raises:
            Fault: no page is open, it went away, it is late, or it says what went wrong.
        """
        count, each = shape[0], len(pixels) // shape[0]
        step = max(1, AT_ONCE // each)
        classes, scores = 0, b""
        with self.turn:
            for start in range(0, count, step):
                part = min(step, count - start)
                classes, values = self._ask(part, shape, pixels[start * each : (start + part) * each])
                scores += values
        return classes, scores

    def _ask(self, part, shape, pixels):
        if self.open is None:
            raise Fault("no page is open: reload it in the browser that opened the link")
        connection, answers = self.open
        try:
            connection.send(struct.pack("<4I", part, *shape[1:]) + pixels)
            answer = answers.get(timeout=SECONDS)
        except queue.Empty:
            raise Fault(f"the page did not answer {part} images within {SECONDS} s") from None
        except Gone:
            answer = None
        if answer is None:
            raise Fault("the page was closed")
        is_text, data = answer
        if is_text:
            raise Fault(f"the page says: {data.decode(errors='replace')[:200]}")
        rows, classes = struct.unpack("<2I", data[:8]) if len(data) >= 8 else (0, 0)
        if rows != part or len(data) != 8 + 4 * rows * classes:
            raise Fault("what the page answered is no answer")
        return classes, data[8:]


class Judge(socketserver.StreamRequestHandler):
    """One conversation in the protocol: N, C, H, W as little-endian uint32 and float32 images; N, K and scores back."""

    disable_nagle_algorithm = True
    page = None  # set by the server's own class

    def handle(self):
        try:
            while header := self.rfile.read(16):
                if len(header) < 16:
                    raise Fault("a request is cut short")
                shape = struct.unpack("<4I", header)
                size = 4 * math.prod(shape)
                if size > ANNOUNCED:
                    raise Fault(f"a request announces {size:,} bytes of images; at most {ANNOUNCED:,} are taken")
                pixels = self.rfile.read(size)
                if len(pixels) < size:
                    raise Fault("a request is cut short")
                classes, scores = self.page.ask(shape, pixels) if size else (0, b"")
                self.connection.sendall(struct.pack("<2I", shape[0], classes) + scores)
        except Fault as fault:
            print(f"judge: {fault}", file=sys.stderr, flush=True)
        except ConnectionError:
            pass


class Tcp(socketserver.ThreadingTCPServer):
    daemon_threads = allow_reuse_address = True

    def server_activate(self):
        """Not yet: who asks before a page is open shall be refused, not kept waiting."""

    def begin(self):
        self.socket.listen(8)
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Http(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def server_bind(self):
        socketserver.TCPServer.server_bind(self)  # without asking a name server who this is


class Handler(http.server.BaseHTTPRequestHandler):
    """The page and its files, for the one browser that opened the link."""

    protocol_version = "HTTP/1.1"
    timeout = 60
    site = None  # set by the server's own class

    def do_GET(self):
        site, url = self.site, urllib.parse.urlsplit(self.path)
        key = urllib.parse.parse_qs(url.query).get("key", [""])[0]
        if url.path == "/" and key and site.admits(key):
            self.send_response(303)
            self.send_header("Location", "/")  # the key stands in no history
            self.send_header("Set-Cookie", f"{self._name()}={site.cookie}; HttpOnly; SameSite=Strict; Path=/")
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif not self._known():
            self._say(
                403, b"This link opens once, and has been used, or is none. Start serve.py again for a new one.\n"
            )
        elif url.path == "/judge":
            self._judge()
        elif url.path in site.files:
            data, kind = site.files[url.path]
            self._say(200, data, kind)
        else:
            self._say(404, b"There is no such page.\n")

    def _name(self):
        # Cookies are shared by all ports of a host.
        return f"edgekit-{self.server.server_address[1]}"

    def _known(self):
        cookies = dict(part.strip().partition("=")[::2] for part in self.headers.get("Cookie", "").split(";"))
        return hmac.compare_digest(cookies.get(self._name(), "").encode(), self.site.cookie.encode())

    def _say(self, status, data, kind="text/plain; charset=utf-8"):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        for key, value in (
            ("Cache-Control", "no-store"),
            ("Referrer-Policy", "no-referrer"),
            ("X-Content-Type-Options", "nosniff"),
            (
                "Content-Security-Policy",
                "default-src 'self'; script-src 'self' 'wasm-unsafe-eval'; style-src 'unsafe-inline'; "
                "img-src 'self' blob: data:; connect-src 'self' ws:; frame-ancestors 'none'",
            ),
        ):
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(data)

    def _judge(self):
        key = self.headers.get("Sec-WebSocket-Key")
        # Pages of other ports of this host send the cookie too; they cannot choose their Origin.
        if key is None or self.headers.get("Origin") != f"http://{self.headers.get('Host')}":
            self._say(400, b"A WebSocket of this page is expected here.\n")
            return
        accept = base64.b64encode(hashlib.sha1(key.encode() + _GUID).digest()).decode()
        self.send_response(101)
        for name, value in (("Upgrade", "websocket"), ("Connection", "Upgrade"), ("Sec-WebSocket-Accept", accept)):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.flush()
        self.close_connection = True
        self.connection.settimeout(None)
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.site.opened(WebSocket(self.rfile, self.connection))

    def log_message(self, *_):
        """Nothing: the link's key would stand in it."""


class Site:
    """What is served, to whom, and where the judge listens."""

    def __init__(self, folder, library, judge):
        self.files = {path: (read(HERE / name), kind) for path, (name, kind) in PAGE.items()}
        self.files |= {f"/ort/{name}": (read(library / name), media(name)) for name in ORT}
        record = read(folder / "artifact.json")
        try:
            said = json.loads(record)
            kind = said["format"]
            digests = {one["path"]: one["sha256"] for one in said["files"]}
        except (ValueError, KeyError, TypeError) as error:
            raise Fault(f"{folder / 'artifact.json'} is no description of an artifact ({error!r})") from None
        if kind != "onnx":
            raise Fault(f"{folder} is made for {kind}; a browser runs onnx here")
        model = read(folder / "model.onnx")
        if hashlib.sha256(model).hexdigest() != digests.get("model.onnx"):
            raise Fault(f"{folder / 'model.onnx'} is not the file that was exported: artifact.json has another sha256")
        self.files |= {
            "/artifact.json": (record, "application/json"),
            "/model.onnx": (model, "application/octet-stream"),
        }
        self.key, self.cookie = secrets.token_urlsafe(16), secrets.token_urlsafe(32)
        self.page, self.judge, self.listening = Page(), judge, False
        self.lock = threading.Lock()

    def admits(self, key):
        """Whether it is the link's key, for the first time."""
        with self.lock:
            fits = self.key is not None and hmac.compare_digest(key.encode(), self.key.encode())
            if fits:
                self.key = None
            return fits

    def opened(self, connection):
        """Keep the page as the judge until it is closed."""
        with self.lock:
            if not self.listening:
                host, port = self.judge.server_address[:2]
                self.judge.begin()
                self.listening = True
                print(f"The page is open. edgekit verify … --judge tcp://{bracketed(host)}:{port}", flush=True)
        self.page.stay(connection)


def read(path):
    try:
        return path.read_bytes()
    except OSError as error:
        raise Fault(f"{path}: {error.strerror}") from None


def media(name):
    return "application/wasm" if name.endswith(".wasm") else "text/javascript; charset=utf-8"


def bracketed(host):
    return f"[{host}]" if ":" in host else host


def library(named):
    """The folder of onnxruntime-web's files: the one that was named, else where npm or edgekit has put it."""
    cache = (
        os.environ.get("EDGEKIT_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgekit"
    )
    places = [Path(parent) / "node_modules/onnxruntime-web/dist" for parent in (Path.cwd(), HERE)]
    places += sorted(Path(cache).glob("processors/wasm-*/package/dist"), reverse=True)
    for place in [named] if named else places:
        if (place / LIBRARY).is_file():
            return place
    raise Fault(f"there is no {LIBRARY}{f' in {named}' if named else ''}. Run: npm install onnxruntime-web@1.30.0", 4)


def place(address, option):
    host, _, port = address.rpartition(":")
    if not port.isdecimal() or int(port) > 65535:
        raise Fault(f"{option} {address}: write PORT or HOST:PORT")
    return host.removeprefix("[").removesuffix("]") or "127.0.0.1", int(port)


def listening(kind, handler, where, option):
    """A server at that place.

    Raises:
        Fault: (exit status 4) the place cannot be had.
    """
    host, port = where
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return type("Server", (kind,), {"address_family": family})((host, port), handler)
    except OSError as error:
        raise Fault(f"{option} {bracketed(host)}:{port}: cannot listen there ({error.strerror})", 4) from None


def reachable(host):
    """The host for the link; of a server on all interfaces the address that the network knows this machine by."""
    if host not in ("0.0.0.0", "::"):
        return host
    family, far = (socket.AF_INET6, "2001:db8::1") if host == "::" else (socket.AF_INET, "192.0.2.1")
    # Where there is no network, the machine's own name is left.
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as asked:
        asked.connect((far, 9))  # sends nothing; chooses the interface
        return asked.getsockname()[0]
    return socket.gethostname()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, help="the folder with model.onnx and artifact.json")
    parser.add_argument("--listen", default="0", metavar="[HOST:]PORT", help="of the page; by default a free port")
    parser.add_argument("--judge", default="0", metavar="[HOST:]PORT", help="of the judge; by default a free port")
    parser.add_argument("--ort", type=Path, metavar="FOLDER", help=f"with onnxruntime-web's {LIBRARY}")
    arguments = parser.parse_args()
    try:
        judge = listening(Tcp, Judge, place(arguments.judge, "--judge"), "--judge")
        site = Site(arguments.artifact, library(arguments.ort), judge)
        judge.RequestHandlerClass = type("Conversation", (Judge,), {"page": site.page})
        handler = type("Visitor", (Handler,), {"site": site})
        with listening(Http, handler, place(arguments.listen, "--listen"), "--listen") as pages:
            host, port = pages.server_address[:2]
            print(f"Open, once: http://{bracketed(reachable(host))}:{port}/?key={site.key}", flush=True)
            pages.serve_forever()
    except Fault as fault:
        print(fault, file=sys.stderr)
        sys.exit(fault.status)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
