"""The cache's second tier in Redis, so that several machines share it. Loaded only with REDIS_URL set.

The server keeps the time to live and may forget anything at any moment. Whatever goes wrong is
CacheUnavailable: the caller computes instead, and its circuit breaker decides when to try again. Connecting
goes on in the background, since a handshake may take longer than a lookup is allowed to.
"""

import asyncio
from collections.abc import Sequence

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from service.errors import CacheUnavailable, SettingsInvalid

_NAMESPACE = b"perpd:features:1:"  # the number is the form of the bodies
_CONNECT_LIMIT_S = 5.0
_PUT_LIMITS = 20  # a put is in nobody's way: it may take this many times as long as a get


class RedisTier:
    """Implements `ports.CacheTier`. One request a batch."""

    shared = True

    def __init__(self, url: str, *, limit_s: float, speed: float) -> None:
        """Nothing is sent yet.

        Args: limit_s: of a get; speed: of the market, whose time the server does not know.
        Raises: SettingsInvalid: the address is none.
        """
        self.limit_s = limit_s
        self.put_limit_s = limit_s * _PUT_LIMITS
        self._speed = speed
        try:
            self._client = Redis.from_url(
                url,
                max_connections=4,
                socket_connect_timeout=_CONNECT_LIMIT_S,
                retry=Retry(NoBackoff(), 0),
            )
        except ValueError:
            raise SettingsInvalid(
                "environment: REDIS_URL is no address of a Redis server; "
                "allowed is redis://[user:password@]host[:port][/database], rediss:// or unix://"
            ) from None
        self._ready = False
        self._connecting: asyncio.Task[str] | None = None

    def connect(self) -> "asyncio.Task[str]":
        """Begin to connect, unless that is under way; the result says why it failed, "" when it did not."""
        if self._connecting is None or self._connecting.done():
            self._connecting = asyncio.create_task(self._connect(), name="features.redis")
        return self._connecting

    async def get_many(
        self, rows: Sequence[int], tokens: Sequence[bytes], now_ms: int, ttl_ms: int
    ) -> list[bytes | None]:
        await self._be_ready()
        try:
            found = await self._client.mget([_key(token) for token in tokens])
        except (RedisError, OSError) as error:
            raise self._unavailable(error) from error
        except asyncio.CancelledError:
            self._ready = False
            raise
        return [value if isinstance(value, bytes) else None for value in found]

    async def put_many(
        self, rows: Sequence[int], tokens: Sequence[bytes], bodies: Sequence[bytes], now_ms: int, ttl_ms: int
    ) -> None:
        await self._be_ready()
        life_ms = max(round(ttl_ms / self._speed), 1)
        batch = self._client.pipeline(transaction=False)
        for token, body in zip(tokens, bodies, strict=True):
            batch.set(_key(token), body, px=life_ms)
        try:
            await batch.execute()
        except (RedisError, OSError) as error:
            raise self._unavailable(error) from error
        except asyncio.CancelledError:
            self._ready = False
            raise

    async def close(self) -> None:
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.wait({self._connecting})
        await self._client.aclose()

    async def _be_ready(self) -> None:
        """Wait for the connection, no longer than a get may take. Raises CacheUnavailable."""
        if self._ready:
            return
        connecting = self.connect()
        await asyncio.wait({connecting}, timeout=self.limit_s / 2)
        if not connecting.done():
            raise CacheUnavailable("Redis: connecting takes longer than a lookup may")
        if reason := connecting.result():
            raise CacheUnavailable(reason)

    async def _connect(self) -> str:
        try:
            async with asyncio.timeout(_CONNECT_LIMIT_S):
                await self._client.ping()
        except (RedisError, OSError, TimeoutError) as error:
            return str(self._unavailable(error))
        self._ready = True
        return ""

    def _unavailable(self, error: Exception) -> CacheUnavailable:
        self._ready = False
        return CacheUnavailable(f"Redis: {type(error).__name__}: {error}")


def _key(token: bytes) -> bytes:
    return _NAMESPACE + token.hex().encode()
