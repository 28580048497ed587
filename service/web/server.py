"""Three pages over HTTP/1.1: /health, /ready and /metrics, and what is given as `api` below /api/.

One request a connection.

Written on asyncio streams because aiohttp.web would cost 6 MB more than its client, for three pages.
Whatever arrives is bounded: head and body in bytes and time, and so the headers in number, the answer in
the time a client may take to read it, the connections in number.
"""

import asyncio
import errno
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import structlog

from service.errors import PortInUse, SettingsInvalid

log = structlog.get_logger("web.server")

HEAD_LIMIT_BYTES = 8_192
HEAD_LIMIT_S = 5.0
ANSWER_LIMIT_S = 5.0
CONNECTIONS_LIMIT = 32
BODY_LIMIT_BYTES = 4_096
_LENGTH_DIGITS = 9  # more are no length that is served, and thousands no number that is parsed

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_JSON_TYPE = "application/json"
_REASONS = {
    200: "OK",
    400: "Bad Request",
    401: "Unauthorized",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    413: "Content Too Large",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    503: "Service Unavailable",
    505: "HTTP Version Not Supported",
}

Health = Callable[[], Mapping[str, Any]]
Ready = Callable[[], tuple[bool, Mapping[str, Any]]]
Metrics = Callable[[], str]


class Answer(msgspec.Struct, frozen=True):
    """Status, content type and body of one answer."""

    status: int
    content_type: str
    body: bytes
    allow: bool = False  # name the methods that are served


class ApiRequest(msgspec.Struct, frozen=True):
    """A request below /api/. `token` is what follows "Bearer ", "" where nothing does."""

    method: str
    path: str
    token: str
    body: bytes


Api = Callable[[ApiRequest], Awaitable[Answer]]


def parse_request_line(head: bytes) -> tuple[str, str] | int:
    """Method and path of a request's head, or the status that refuses it."""
    line = head.split(b"\r\n", 1)[0].split(b"\n", 1)[0]
    parts = line.split(b" ")
    if len(parts) != 3 or not parts[0].isalpha() or not parts[1].startswith((b"/", b"http://")):
        return 400
    if not parts[2].startswith(b"HTTP/1."):
        return 505 if parts[2].startswith(b"HTTP/") else 400
    try:
        method, target = parts[0].decode("ascii"), parts[1].decode("ascii")
    except UnicodeDecodeError:
        return 400
    if target.startswith("http://"):
        target = "/" + target.removeprefix("http://").partition("/")[2]
    return method, target.partition("?")[0]


def answer_to(request: tuple[str, str] | int, health: Health, ready: Ready, metrics: Metrics) -> Answer:
    """The answer to a request. A page that raises is a 500, logged with its traceback."""
    if isinstance(request, int):
        return problem(request)
    method, path = request
    pages: dict[str, Callable[[], Answer]] = {
        "/health": lambda: json_answer(200, {"status": "ok", **health()}),
        "/ready": lambda: _ready(*ready()),
        "/metrics": lambda: Answer(200, METRICS_TYPE, metrics().encode()),
    }
    page = pages.get(path)
    if page is None:
        return problem(404)
    if method not in ("GET", "HEAD"):
        return problem(405)
    try:
        return page()
    except Exception:
        log.exception("a page failed", path=path)
        return problem(500)


def _ready(ready: bool, detail: Mapping[str, Any]) -> Answer:
    return json_answer(200 if ready else 503, {"status": "ready" if ready else "not ready", **detail})


def json_answer(status: int, content: Mapping[str, Any]) -> Answer:
    """One JSON object."""
    return Answer(status, _JSON_TYPE, msgspec.json.encode(content) + b"\n")


def problem(status: int) -> Answer:
    """A refusal in the status's own words."""
    answer = json_answer(status, {"status": "error", "error": _REASONS[status]})
    return msgspec.structs.replace(answer, allow=status == 405)


def encode(answer: Answer, *, with_body: bool) -> bytes:
    """The answer as bytes. HEAD gets the length of the body it does not get."""
    lines = [
        f"HTTP/1.1 {answer.status} {_REASONS[answer.status]}",
        f"Content-Type: {answer.content_type}",
        f"Content-Length: {len(answer.body)}",
        "Cache-Control: no-store",
        "X-Content-Type-Options: nosniff",
        *(["Allow: GET, HEAD"] if answer.allow else []),
        "Connection: close",
    ]
    head = "\r\n".join(lines).encode() + b"\r\n\r\n"
    return head + answer.body if with_body else head


@asynccontextmanager
async def serving(
    host: str, port: int, *, health: Health, ready: Ready, metrics: Metrics, api: Api | None = None
) -> AsyncIterator[int]:
    """Serve the pages while the block runs; yields the port, chosen by the system when 0.

    Args: host: "::" serves IPv4 and IPv6; ready: (ready, what stands in the answer, such as reasons);
    api: answers what is below /api/, where there is one.
    Raises: PortInUse: another process listens there; SettingsInvalid: the host is not ours to bind.
    """
    connections: set[asyncio.Task[None]] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if len(connections) >= CONNECTIONS_LIMIT:
            writer.transport.abort()
            return
        connections.add(task)
        try:
            await _serve_one(reader, writer, lambda request: answer_to(request, health, ready, metrics), api)
        finally:
            connections.discard(task)

    listener = _listen(host, port)
    server = await asyncio.start_server(connected, sock=listener, limit=HEAD_LIMIT_BYTES)
    try:
        yield listener.getsockname()[1]
    finally:
        server.close()
        for task in connections:
            task.cancel()
        if connections:
            await asyncio.wait(connections, timeout=ANSWER_LIMIT_S)
        await server.wait_closed()


def _listen(host: str, port: int) -> socket.socket:
    """A bound, listening socket; dual stack on "::", or IPv4 where the machine has no IPv6."""
    where = f"{host}:{port} (settings web.host and web.port, or PORT)"
    try:
        if host == "::":
            return _listen_everywhere(port)
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server((str(address[0]), port), family=family, backlog=CONNECTIONS_LIMIT)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise PortInUse(f"another process listens on {where}") from error
        raise SettingsInvalid(f"cannot listen on {where}: {error}") from error


def _listen_everywhere(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(
                ("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=CONNECTIONS_LIMIT
            )
        except OSError as error:
            # IPv6 compiled in, but switched off on this machine
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                raise
    return socket.create_server(("0.0.0.0", port), backlog=CONNECTIONS_LIMIT)


async def _serve_one(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    pages: Callable[[tuple[str, str] | int], Answer],
    api: Api | None,
) -> None:
    try:
        head = await _read_head(reader)
        if head is not None:
            request = parse_request_line(head) if isinstance(head, bytes) else head
            if isinstance(request, int) or isinstance(head, int) or api is None or not _is_api(request):
                answer = pages(request)
            else:
                answer = await _answer_api(api, request, head, reader)
            is_head = not isinstance(request, int) and request[0] == "HEAD"
            writer.write(encode(answer, with_body=not is_head))
            async with asyncio.timeout(ANSWER_LIMIT_S):
                await writer.drain()
    except (OSError, TimeoutError) as error:
        log.debug("a web client went away", error=str(error))
    finally:
        await _close(writer)


def _is_api(request: tuple[str, str]) -> bool:
    return request[1].startswith("/api/")


async def _answer_api(
    api: Api, request: tuple[str, str], head: bytes, reader: asyncio.StreamReader
) -> Answer:
    """Read the body, bounded in bytes and time, and ask. What raises is a 500, logged."""
    headers = _headers(head)
    length = headers.get("content-length", "0")
    if not length.isdecimal():
        return problem(400)
    if len(length) > _LENGTH_DIGITS or int(length) > BODY_LIMIT_BYTES:
        return problem(413)
    try:
        async with asyncio.timeout(HEAD_LIMIT_S):
            body = await reader.readexactly(int(length))
    except asyncio.IncompleteReadError:
        return problem(400)
    except TimeoutError:
        return problem(408)
    scheme, _, token = headers.get("authorization", "").partition(" ")
    token = token.strip() if scheme.lower() == "bearer" else ""
    try:
        return await api(ApiRequest(request[0], request[1], token, body))
    except Exception:
        log.exception("a page failed", path=request[1])
        return problem(500)


def _headers(head: bytes) -> dict[str, str]:
    """Header names in lower case to their values, the last of each name."""
    found = {}
    for line in head.split(b"\r\n")[1:]:
        name, colon, value = line.decode("latin-1").partition(":")
        if colon:
            found[name.strip().lower()] = value.strip()
    return found


async def _read_head(reader: asyncio.StreamReader) -> bytes | int | None:
    """The head, the status that refuses it, or None when the client sent nothing."""
    try:
        async with asyncio.timeout(HEAD_LIMIT_S):
            return await reader.readuntil(b"\r\n\r\n")
    except asyncio.LimitOverrunError:
        return 431
    except asyncio.IncompleteReadError as error:
        return 400 if error.partial else None
    except TimeoutError:
        return 408


async def _close(writer: asyncio.StreamWriter) -> None:
    """Closing alone waits for the client to read, and a client may never do so."""
    writer.close()
    try:
        async with asyncio.timeout(ANSWER_LIMIT_S):
            await writer.wait_closed()
    except (OSError, TimeoutError):
        writer.transport.abort()
