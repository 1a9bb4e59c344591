"""A TCP proxy in a thread that can cut, stall and filter what passes: faults at the real seam."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator

Filter = Callable[[bytes], bytes]


class TcpProxy:
    """Forwards connections to a port. The test decides what happens to them.

    `plan`, called with the number of each new connection (0, 1, …), gives after how many bytes from the
    server that connection is reset, or None; `plan_to_server` counts the bytes from the client. `to_client`
    and `to_server` may change what passes. While `refusing`, new connections are reset at once.
    """

    def __init__(
        self,
        target_port: int,
        plan: Callable[[int], int | None] = lambda number: None,
        to_client: Filter = bytes,
        to_server: Filter = bytes,
    ) -> None:
        self._target = ("127.0.0.1", target_port)
        self.plan = plan
        self.plan_to_server: Callable[[int], int | None] = lambda number: None
        self.to_client = to_client
        self.to_server = to_server
        self.refusing = False
        self.read_max = 65536
        """So many bytes pass at once, at most."""
        self.connections = 0
        self._open: set[socket.socket] = set()
        self._taking = threading.Lock()
        """Held while a connection is taken: one that is not yet among the open ones would escape a cut."""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with self._taking:
                self._take(client)

    def _take(self, client: socket.socket) -> None:
        if self.refusing:
            _reset(client)
            return
        number, self.connections = self.connections, self.connections + 1
        try:
            server = socket.create_connection(self._target, timeout=10)
            server.settimeout(None)
        except OSError:
            _reset(client)
            return
        self._open.update((client, server))
        limit = self.plan(number)
        for source, sink, change, most in (
            (client, server, lambda data: self.to_server(data), self.plan_to_server(number)),
            (server, client, lambda data: self.to_client(data), limit),
        ):
            threading.Thread(target=self._forward, args=(source, sink, change, most), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket, change: Filter, most: int | None) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while most is None or passed < most:
                data = source.recv(self.read_max)
                if not data:
                    with contextlib.suppress(OSError):
                        sink.shutdown(socket.SHUT_WR)
                    return
                data = change(data)
                if most is not None:
                    data = data[: most - passed]
                sink.sendall(data)
                passed += len(data)
        for end in (source, sink):
            self._open.discard(end)
            _reset(end)

    def lead_to(self, target_port: int) -> None:
        """Forward new connections to another port."""
        self._target = ("127.0.0.1", target_port)

    def cut_all(self) -> None:
        """Reset every open connection. Once it is `refusing`, none is open behind this."""
        with self._taking:
            for end in list(self._open):
                self._open.discard(end)
                _reset(end)

    def close(self) -> None:
        # Closing alone does not wake an accept: it would take one more connection, which nobody then closed.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._accepting.join(30)
        self.cut_all()

    @classmethod
    @contextlib.contextmanager
    def running(cls, *args: object, **kwargs: object) -> Iterator[TcpProxy]:
        proxy = cls(*args, **kwargs)  # type: ignore[arg-type]
        try:
            yield proxy
        finally:
            proxy.close()


def _reset(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        end.shutdown(socket.SHUT_RDWR)
    with contextlib.suppress(OSError):
        end.close()
