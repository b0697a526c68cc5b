"""`python -m edgekit.judge.serve FILE --port 0`: a judge over TCP, for a device with Python on it.

It prints its address, tcp://HOST:PORT, and listens on loopback unless `--listen ADDRESS` names another interface.
Whoever connects may ask as much as they like.
"""

import argparse
import socket
import socketserver
import sys
import threading
from io import RawIOBase
from typing import cast

import numpy

from edgekit.errors import ENVIRONMENT, EdgekitError
from edgekit.judge import child, protocol

LOOPBACK = "127.0.0.1"


class Server(socketserver.ThreadingTCPServer):
    """Answers each connection in a thread of its own, one batch at a time over all of them.

    Raises:
        EdgekitError: (exit code 4) the address or port cannot be had.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, scores: protocol.Scores, classes: int = 0, *, port: int = 0, listen: str = LOOPBACK) -> None:
        self.scores, self.classes, self.turn = scores, classes, threading.Lock()
        if ":" in listen:
            self.address_family = socket.AF_INET6
        try:
            super().__init__((listen, port), _Conversation)
        except (OSError, OverflowError) as error:
            what = f"cannot listen there ({getattr(error, 'strerror', None) or error})"
            raise EdgekitError(what, where=f"{listen} port {port}", exit_code=ENVIRONMENT) from None

    @property
    def address(self) -> str:
        host, port = self.server_address[:2]
        return f"tcp://[{host!s}]:{port}" if self.address_family == socket.AF_INET6 else f"tcp://{host!s}:{port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """One line on stderr; the next connection is served all the same."""
        error = sys.exception()
        if isinstance(error, EdgekitError):
            said = str(error)
        elif isinstance(error, ConnectionError):
            return
        else:
            said = child.sentence(error) if isinstance(error, Exception) else repr(error)
        print(f"{client_address}: {said}", file=sys.stderr, flush=True)


class _Conversation(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        server = cast(Server, self.server)
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        stream: RawIOBase = self.request.makefile("rwb", buffering=0)

        def scores(pixels: numpy.ndarray) -> numpy.ndarray:
            with server.turn:
                return server.scores(pixels)

        protocol.serve(stream, stream, scores, classes=server.classes)


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(prog="python -m edgekit.judge.serve", description=__doc__)
    child.add_arguments(parser)
    parser.add_argument("--port", type=int, default=0, help="0, the default, takes a free one")
    parser.add_argument("--listen", default=LOOPBACK, metavar="ADDRESS", help="an interface; loopback by default")
    arguments = parser.parse_args()
    try:
        scores, classes = child.opened(arguments)
        with Server(scores, classes, port=arguments.port, listen=arguments.listen) as server:
            print(server.address, flush=True)
            server.serve_forever()
    except EdgekitError as error:
        sys.exit(_said(error))
    except KeyboardInterrupt:
        sys.exit(130)


def _said(error: EdgekitError) -> int:
    print(error, file=sys.stderr)
    return error.exit_code


if __name__ == "__main__":
    main()
