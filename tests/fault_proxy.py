"""A proxy in front of an S3 server that throttles, resets, cuts off, delays and goes away, as storage far away does.

It listens on the loopback address, passes requests on as they are (the signature stays valid), and is seeded. Faults
are switched on for a block, and counted, so that a test can say that they did happen:

    with FaultProxy(server) as proxy, proxy.faults(Faults(reset=0.05, throttle=0.05)):
        ...
    assert proxy.met["reset"]
"""

from __future__ import annotations

import asyncio
import random
import re
import socket
import struct
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from urllib.parse import parse_qsl, urlsplit

SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


@dataclass(frozen=True)
class Faults:
    """Probability of each fault, for each request."""

    throttle: float = 0.0
    """503 SlowDown in place of an answer; the server does not see the request."""
    refuse: float = 0.0
    """The connection is reset before the server sees the request."""
    reset: float = 0.0
    """The connection is reset in the middle of the answer: the server has done what was asked."""
    truncate: float = 0.0
    """The answer promises its whole length, and ends in the middle as if nothing were wrong."""
    shorten: float = 0.0
    """The answer is cut in the middle, its length made to fit, its checksum lost: only who knows better can tell."""
    slow: float = 0.0
    """The first byte of the answer takes ``delay`` seconds."""
    delay: float = 1.0
    """Seconds."""
    on: str = ""
    """Only for these operations: a regular expression."""
    most: int = sys.maxsize
    """No more faults than these."""


@dataclass
class Request:
    """What a client has asked for."""

    method: str
    target: str
    head: bytes
    """All of it, up to the empty line."""
    body: bytes = b""

    @property
    def key(self) -> str:
        """bucket/key."""
        return urlsplit(self.target).path.lstrip("/")

    @property
    def query(self) -> dict[str, str]:
        """What follows the question mark."""
        return dict(parse_qsl(urlsplit(self.target).query, keep_blank_values=True))

    @property
    def operation(self) -> str:
        """S3's name of what is asked for: GetObject, UploadPart."""
        whole = "/" not in self.key.rstrip("/")
        named = {
            ("POST", "uploads"): "CreateMultipartUpload",
            ("POST", "uploadId"): "CompleteMultipartUpload",
            ("POST", "delete"): "DeleteObjects",
            ("PUT", "uploadId"): "UploadPart",
            ("DELETE", "uploadId"): "AbortMultipartUpload",
            ("GET", "list-type"): "ListObjectsV2",
        }
        for (method, word), name in named.items():
            if method == self.method and word in self.query:
                return name
        noun = "Bucket" if whole else "Object"
        verb = {"GET": "Get", "HEAD": "Head", "PUT": "Put", "DELETE": "Delete", "POST": "Post"}.get(self.method, "")
        return verb + noun


Answer = Callable[[Request], "tuple[int, dict[str, str], bytes] | None"]
"""Status, headers and body to give in the server's stead; None passes the request on."""


@dataclass
class FaultProxy:
    """A proxy to the server at ``upstream``, http://HOST:PORT; within ``with`` it runs in a thread of its own."""

    upstream: str
    seed: int = 0
    asked: Counter[str] = field(default_factory=Counter)
    """Requests by operation, faulty ones included."""
    done: Counter[str] = field(default_factory=Counter)
    """Requests by operation that the server has answered."""
    met: Counter[str] = field(default_factory=Counter)
    """Faults that happened, by the name of their field; ``outage`` counts the connections that were lost by it."""
    keys: list[tuple[str, str]] = field(default_factory=list)
    """(operation, bucket/key) of every request that the server has answered."""
    at_once: int = 0
    """Requests in hand at the same time, at most."""

    def __enter__(self) -> FaultProxy:
        self._rates, self._answer = Faults(), None
        self._random = random.Random(self.seed)
        self._left = self._inside = 0
        self._away = False
        self._loop = asyncio.new_event_loop()
        self._open: set[asyncio.StreamWriter] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.port = 0
        self._run(self._listen())
        return self

    def __exit__(self, *_: object) -> None:
        self._run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def address(self) -> str:
        """http://HOST:PORT, as AWS_ENDPOINT_URL wants it."""
        return f"http://127.0.0.1:{self.port}"

    @contextmanager
    def faults(self, faults: Faults) -> Iterator[None]:
        """These faults within the block, and no others."""
        before, self._rates, self._left = self._rates, faults, faults.most
        try:
            yield
        finally:
            self._rates = before

    @contextmanager
    def answering(self, answer: Answer) -> Iterator[None]:
        """Within the block, ``answer`` speaks in the server's stead where it has something to say."""
        before, self._answer = self._answer, answer
        try:
            yield
        finally:
            self._answer = before

    def outage(self, seconds: float, *, listening: bool = False) -> None:
        """From now on, and for so long, every connection is refused; those that are open are reset.

        Args:
            seconds: until all is well again.
            listening: somebody listens all the same, and resets what comes.
        """
        self._run(self._leave(seconds, listening))

    # In the thread of the loop.

    def _run(self, work: object) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(30)  # type: ignore[arg-type]

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, reuse_address=True)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        self._server.close()
        for writer in list(self._open):
            _reset(writer)

    async def _leave(self, seconds: float, listening: bool) -> None:
        self.met["outage"] += len(self._open)
        await self._close()
        self._away = listening
        if listening:
            await self._listen()
        self._back = self._loop.create_task(self._return(seconds, listening))

    async def _return(self, seconds: float, listening: bool) -> None:
        await asyncio.sleep(seconds)
        self._away = False
        if not listening:
            await self._listen()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._away:
            self._fault("outage", writer)
            return
        self._open.add(writer)
        try:
            while request := await _read_request(reader, writer):
                self._inside += 1
                self.at_once = max(self.at_once, self._inside)
                try:
                    if not await self._handle(request, writer):
                        break
                finally:
                    self._inside -= 1
        except (ConnectionError, asyncio.IncompleteReadError, TimeoutError):
            pass
        finally:
            self._open.discard(writer)
            writer.close()

    async def _handle(self, request: Request, writer: asyncio.StreamWriter) -> bool:
        """Answer a request; returns whether the connection stays open."""
        self.asked[request.operation] += 1
        rates = self._rates
        hit = self._draw(request)
        if "refuse" in hit:
            return self._fault("refuse", writer)
        if self._answer and (said := self._answer(request)):
            await _write(writer, _response(*said, head_only=request.method == "HEAD"))
            return True
        if "throttle" in hit:
            self.met["throttle"] += 1
            await _write(writer, _response(503, {}, SLOW_DOWN, head_only=request.method == "HEAD"))
            return True
        if "slow" in hit:
            self.met["slow"] += 1
            await asyncio.sleep(rates.delay)
        head, body = await self._ask(request)
        self.done[request.operation] += 1
        self.keys.append((request.operation, request.key))
        if "reset" in hit:
            await _write(writer, head + body[: len(body) // 2] if body else head[: len(head) // 2])
            return self._fault("reset", writer)
        if "truncate" in hit and len(body) > 1:
            self.met["truncate"] += 1
            await _write(writer, head + body[: len(body) // 2])
            return False
        if "shorten" in hit and len(body) > 1:
            self.met["shorten"] += 1
            body = body[: len(body) // 2]
            head = re.sub(rb"(?im)^x-amz-checksum-[^\n]*\n", b"", head)
            head = re.sub(rb"(?i)content-length: \d+", f"Content-Length: {len(body)}".encode(), head)
        await _write(writer, head + body)
        return True

    def _draw(self, request: Request) -> set[str]:
        """Names of the faults that this request meets."""
        rates = self._rates
        if not re.search(rates.on, request.operation):
            return set()
        kinds = [f.name for f in fields(rates) if isinstance(f.default, float) and f.name != "delay"]
        hit = {kind for kind in kinds if self._random.random() < getattr(rates, kind)}
        if hit:
            self._left -= 1
        return hit if self._left >= 0 else set()

    def _fault(self, name: str, writer: asyncio.StreamWriter) -> bool:
        self.met[name] += 1
        _reset(writer)
        return False

    async def _ask(self, request: Request) -> tuple[bytes, bytes]:
        """The server's answer: its head, with the length of what follows, and its body."""
        there = urlsplit(self.upstream)
        reader, writer = await asyncio.open_connection(there.hostname, there.port)
        try:
            head = re.sub(rb"(?im)^(?:connection|expect|transfer-encoding|content-length):[^\n]*\n", b"", request.head)
            extra = f"Connection: close\r\nContent-Length: {len(request.body)}\r\n\r\n".encode()
            writer.write(head[:-2] + extra + request.body)
            answer = await reader.readuntil(b"\r\n\r\n")
            if request.method == "HEAD" or answer.split()[1] in (b"204", b"304"):
                return re.sub(rb"(?im)^connection:[^\n]*\n", b"", answer), b""
            body = await _read_body(answer, reader, to_end=True)
            answer = re.sub(rb"(?im)^(?:connection|transfer-encoding|content-length):[^\n]*\n", b"", answer)
            return answer[:-2] + f"Content-Length: {len(body)}\r\n\r\n".encode(), body
        finally:
            writer.close()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close a connection so that the other side meets "connection reset by peer"."""
    with suppress(OSError, AttributeError):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def _write(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(data)
    await writer.drain()


def _response(status: int, headers: dict[str, str], body: bytes, *, head_only: bool) -> bytes:
    lines = [f"HTTP/1.1 {status} Fault", "Content-Type: application/xml", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + (b"" if head_only else body)


def _header(head: bytes, name: str) -> str:
    found = re.search(rf"(?im)^{name}:[ \t]*([^\r\n]*)".encode(), head)
    return found[1].decode().strip().lower() if found else ""


async def _read_request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Request | None:
    """The next request of a connection; None when there is none."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    if _header(head, "expect") == "100-continue":
        await _write(writer, b"HTTP/1.1 100 Continue\r\n\r\n")
    method, target, _ = head.split(b"\r\n", 1)[0].decode().split(" ")
    return Request(method, target, head, await _read_body(head, reader))


async def _read_body(head: bytes, reader: asyncio.StreamReader, *, to_end: bool = False) -> bytes:
    """The body that follows a head; without any length there is none, or all up to the end of the connection."""
    if _header(head, "transfer-encoding") == "chunked":
        pieces = []
        while size := int((await reader.readline()).split(b";")[0], 16):
            pieces.append(await reader.readexactly(size))
            await reader.readexactly(2)
        while (await reader.readline()).strip():  # trailers
            pass
        return b"".join(pieces)
    if length := _header(head, "content-length"):
        return await reader.readexactly(int(length))
    return await reader.read() if to_end else b""
