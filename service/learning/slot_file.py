"""The cache's disk tier: one file of fixed size, a slot for each row of the candle store.

It survives restarts, cannot grow and needs no cleaning: a slot's next entry overwrites the one before. It
is read and written with pread and pwrite, so it is resident nowhere, and a broken disk is an error, not a
signal. Layout: a header of 32 bytes (magic, version, slot size, slots, CRC-32), then the slots. A slot:
CRC-32 of what follows, body length, expiry (ms), token (16 bytes), body. Without a right CRC it is no entry.
Nothing is synced: after a power failure a slot may be old or torn, which its token and CRC tell.
"""

import asyncio
import errno
import os
import struct
import threading
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import structlog

from service.errors import CacheUnavailable

FILE_NAME = "features.slots"
TOKEN_BYTES = 16

_HEADER = struct.Struct("=8sIIII8x")  # magic, version, slot size, slots, CRC-32 of the fields before it
_CHECKED = struct.Struct("=8sIII")
_MAGIC, _VERSION = b"PERPDFEA", 1
_SLOT = struct.Struct("=IIq16s")  # CRC-32 of the rest, body length, expires_ms, token
_CRC = struct.Struct("=I")
_LIMIT_S = 0.5  # a disk that takes longer costs more than computing again

log = structlog.get_logger("learning.features")


class SlotFile:
    """Implements `ports.CacheTier`; only this daemon writes it."""

    shared = False
    limit_s = put_limit_s = _LIMIT_S

    def __init__(self, path: Path, slots: int, slot_bytes: int) -> None:
        """Nothing is opened yet. Args: slots: rows of the candle store; slot_bytes: 64 or more."""
        self._path = path
        self._slots = slots
        self._slot_bytes = slot_bytes
        self._descriptor = -1
        self._lock = threading.Lock()  # a get and a put may run in two threads, and one may close on an error
        self.too_large = 0  # bodies that no slot takes

    @property
    def file_bytes(self) -> int:
        return _HEADER.size + self._slots * self._slot_bytes

    async def get_many(
        self, rows: Sequence[int], tokens: Sequence[bytes], now_ms: int, ttl_ms: int
    ) -> list[bytes | None]:
        return await asyncio.to_thread(self.read, rows, tokens, now_ms, ttl_ms)

    async def put_many(
        self, rows: Sequence[int], tokens: Sequence[bytes], bodies: Sequence[bytes], now_ms: int, ttl_ms: int
    ) -> None:
        await asyncio.to_thread(self.write, rows, tokens, bodies, now_ms + ttl_ms)

    async def close(self) -> None:
        await asyncio.to_thread(self._close)

    def read(
        self, rows: Sequence[int], tokens: Sequence[bytes], now_ms: int, ttl_ms: int
    ) -> list[bytes | None]:
        """Blocking. The body of each row's slot, None unless it is whole, in time and of that token."""
        with self._alone():
            try:
                file = self._open()
                slots = [os.pread(file, self._slot_bytes, self._at(row)) for row in rows]
            except OSError as error:
                raise self._unavailable(error) from error
        return [
            _body(slot, token, now_ms, now_ms + ttl_ms) for slot, token in zip(slots, tokens, strict=True)
        ]

    def write(
        self, rows: Sequence[int], tokens: Sequence[bytes], bodies: Sequence[bytes], expires_ms: int
    ) -> None:
        """Blocking. A body that its slot cannot take is counted and left out."""
        with self._alone():
            try:
                file = self._open()
                for row, token, body in zip(rows, tokens, bodies, strict=True):
                    if _SLOT.size + len(body) > self._slot_bytes:
                        self._tell_too_large(len(body))
                        continue
                    rest = _SLOT.pack(0, len(body), expires_ms, token)[_CRC.size :] + body
                    slot = _CRC.pack(zlib.crc32(rest)) + rest
                    if os.pwrite(file, slot, self._at(row)) != len(slot):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                raise self._unavailable(error) from error

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One thread at a time. On a disk that hangs the others give up instead of piling up behind it."""
        if not self._lock.acquire(timeout=_LIMIT_S):
            raise CacheUnavailable(f"{self._path.name}: the disk does not answer")
        try:
            yield
        finally:
            self._lock.release()

    def _tell_too_large(self, body_bytes: int) -> None:
        self.too_large += 1
        if self.too_large == 1:
            log.warning(
                "feature cache: a result is larger than its slot and not kept on disk",
                needed_bytes=_SLOT.size + body_bytes,
                slot_bytes=self._slot_bytes,
                advice="raise features.slot_bytes",
            )

    def _at(self, row: int) -> int:
        return _HEADER.size + row * self._slot_bytes

    def _open(self) -> int:
        """The file, made anew when it is missing, cut short or of another layout: it is only a cache."""
        if self._descriptor >= 0:
            return self._descriptor
        file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fields = _CHECKED.pack(_MAGIC, _VERSION, self._slot_bytes, self._slots)
            header = _HEADER.pack(_MAGIC, _VERSION, self._slot_bytes, self._slots, zlib.crc32(fields))
            if os.pread(file, _HEADER.size, 0) != header or os.fstat(file).st_size != self.file_bytes:
                os.ftruncate(file, 0)
                _allocate(file, self.file_bytes)
                os.pwrite(file, header, 0)
        except OSError:
            os.close(file)
            raise
        self._descriptor = file
        return file

    def _close(self) -> None:
        with self._alone():
            self._drop()

    def _drop(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _unavailable(self, error: OSError) -> CacheUnavailable:
        self._drop()  # the next attempt opens it again
        return CacheUnavailable(f"{self._path.name}: {error.strerror or error}")


def _body(slot: bytes, token: bytes, now_ms: int, latest_ms: int) -> bytes | None:
    if len(slot) < _SLOT.size:
        return None
    crc, length, expires_ms, held = _SLOT.unpack_from(slot)
    if held != token or not now_ms < expires_ms <= latest_ms or _SLOT.size + length > len(slot):
        return None
    end = _SLOT.size + length
    if zlib.crc32(memoryview(slot)[_CRC.size : end]) != crc:
        return None
    return slot[_SLOT.size : end]


def _allocate(file: int, size: int) -> None:
    """Claim the blocks now, so that a disk that fills up later does not fail each write."""
    try:
        os.posix_fallocate(file, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(file, size)
