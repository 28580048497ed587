"""The daemon's control socket: `control.sock` in the data directory, for its owner only.

One question a connection: a JSON object on one line, `{"ask": "memory", ...}`, answered by one JSON line;
`{"error": "..."}` says why there is no answer. A client that leaves cancels what it asked for.
"""

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import structlog

SOCKET_NAME = "control.sock"

_MOST_CLIENTS = 4
_LINE_BYTES = 4_096
_READ_LIMIT_S = 5.0
_WRITE_LIMIT_S = 10.0
_PEER = struct.Struct("3i")  # pid, user id, group id: struct ucred

Question = Mapping[str, Any]
Answerer = Callable[[Question], Awaitable[Mapping[str, Any]]]

log = structlog.get_logger("monitor.control")


class BadQuestion(ValueError):
    """What the client asked makes no sense; the message says so to it."""


@contextmanager
def short_path(directory: Path) -> Iterator[str]:
    """A short name of the socket in a directory: a socket's own path may hold 107 bytes only."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}/{SOCKET_NAME}"
    finally:
        os.close(descriptor)


def _listen(directory: Path) -> socket.socket:
    """The caller holds the data directory's lock: a socket that is there is left from a crash."""
    (directory / SOCKET_NAME).unlink(missing_ok=True)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        os.fchmod(listening.fileno(), 0o600)  # before it has a name, so that nobody gets in between
        with short_path(directory) as path:
            listening.bind(path)
        listening.listen(_MOST_CLIENTS)
    except OSError:
        listening.close()
        raise
    return listening


@asynccontextmanager
async def controlling(directory: Path, answerers: Mapping[str, Answerer]) -> AsyncIterator[None]:
    """Answer questions while the block runs. A socket that cannot be made is told and done without."""
    try:
        listening = _listen(directory)
    except OSError as error:
        log.warning("no control socket: `perpd memory` cannot ask this daemon", reason=str(error))
        yield
        return
    control = _Control(answerers)
    server = await asyncio.start_unix_server(control.serve, sock=listening, limit=_LINE_BYTES)
    try:
        yield
    finally:
        (directory / SOCKET_NAME).unlink(missing_ok=True)
        server.close()
        await control.end()


class _Control:
    def __init__(self, answerers: Mapping[str, Answerer]) -> None:
        self._answerers = answerers
        self._clients: set[asyncio.Task[Any]] = set()
        self._ended = False

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One client, from its question to its answer."""
        task = asyncio.current_task()
        if task is None or self._ended or len(self._clients) >= _MOST_CLIENTS or not _is_owner(writer):
            writer.close()
            return
        self._clients.add(task)
        try:
            answer = await self._answer(reader)
            if answer is not None:
                writer.write(msgspec.json.encode(answer) + b"\n")
                async with asyncio.timeout(_WRITE_LIMIT_S):
                    await writer.drain()
        except (OSError, TimeoutError):
            return  # the client left, or does not read: it has no further right
        finally:
            self._clients.discard(task)
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader) -> Mapping[str, Any] | None:
        """The answer or an error in words; None when the client left first."""
        try:
            async with asyncio.timeout(_READ_LIMIT_S):
                question = msgspec.json.decode(await reader.readuntil(b"\n"), type=dict[str, Any])
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, TimeoutError):
            return None
        except msgspec.DecodeError as error:
            return {"error": f"not one JSON object on a line: {error}"}
        answerer = self._answerers.get(str(question.get("ask")))
        if answerer is None:
            return {"error": f"ask is one of {', '.join(self._answerers)}"}
        return await _while_connected(answerer, question, reader)

    async def end(self) -> None:
        """Cancel what is still being answered, and turn away who was just let in."""
        self._ended = True
        clients = set(self._clients)
        for client in clients:
            client.cancel()
        if clients:
            await asyncio.wait(clients, timeout=_READ_LIMIT_S)


async def _while_connected(
    answerer: Answerer, question: Question, reader: asyncio.StreamReader
) -> Mapping[str, Any] | None:
    working = asyncio.ensure_future(answerer(question))
    leaving = asyncio.ensure_future(reader.read(1))  # whatever comes after the question ends it
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    except BadQuestion as error:
        return {"error": str(error)}
    finally:
        for future in (working, leaving):
            future.cancel()
        with contextlib.suppress(asyncio.CancelledError, BadQuestion, OSError):
            await asyncio.wait({working, leaving}, timeout=_READ_LIMIT_S)


def _is_owner(writer: asyncio.StreamWriter) -> bool:
    """The same user, or root: the file's mode says it, and the kernel vouches for it."""
    peer: socket.socket = writer.get_extra_info("socket")
    data = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    return _PEER.unpack(data)[1] in (0, os.geteuid())
