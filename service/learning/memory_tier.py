"""The cache's entries in memory: least recently used go first, and a scan cannot flush what it still uses."""

from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class _Entry(Generic[V]):
    __slots__ = ("expires_ms", "used_in", "value")

    def __init__(self, value: V, expires_ms: int, used_in: int) -> None:
        self.value = value
        self.expires_ms = expires_ms
        self.used_in = used_in  # the pass that asked for it or put it last


class MemoryTier(Generic[K, V]):
    """At most `limit` entries, each for `ttl_ms` at most.

    A cycle asks for every symbol once, in the same order: one pass. A plain LRU smaller than a pass drops
    each entry just before it is asked for again and never hits. Here a newcomer takes the place of the
    least recently used entry only when the pass under way has not used that entry; else it stays outside.
    """

    def __init__(self, limit: int, ttl_ms: int) -> None:
        """Args: limit: 0 is without bound."""
        self._most = limit
        self._limit = limit
        self._ttl_ms = ttl_ms
        self._entries: dict[K, _Entry[V]] = {}  # least recently used first
        self._pass = 0
        self._sweep_ms = 0
        self.evicted = 0

    def __len__(self) -> int:
        return len(self._entries)

    def begin_pass(self) -> None:
        """From now on entries count as unused until they are asked for or put again."""
        self._pass += 1

    def get(self, key: K, now_ms: int) -> V | None:
        """The value, or None. What is over, or from a time the clock has stepped back from, is dropped."""
        entry = self._entries.pop(key, None)
        if entry is None or not now_ms < entry.expires_ms <= now_ms + self._ttl_ms:
            return None
        entry.used_in = self._pass
        self._entries[key] = entry
        return entry.value

    def put(self, key: K, value: V, now_ms: int) -> bool:
        """Keep the value; False when everything that is kept has been used in this pass."""
        entries = self._entries
        if entries.pop(key, None) is None and 0 < self._limit <= len(entries):
            oldest = next(iter(entries))
            if entries[oldest].used_in == self._pass:
                return False
            del entries[oldest]
            self.evicted += 1
        entries[key] = _Entry(value, now_ms + self._ttl_ms, self._pass)
        return True

    def drop(self, key: K) -> None:
        self._entries.pop(key, None)

    def sweep(self, now_ms: int) -> None:
        """Drop what is over; looks four times in a time to live, and when the clock has stepped back."""
        every_ms = self._ttl_ms // 4
        if self._sweep_ms - every_ms <= now_ms < self._sweep_ms:
            return
        self._sweep_ms = now_ms + every_ms
        over = [k for k, e in self._entries.items() if not now_ms < e.expires_ms <= now_ms + self._ttl_ms]
        for key in over:
            del self._entries[key]
        self.evicted += len(over)

    def shrink(self, on: bool) -> None:
        """Keep half of the entries there may be (of those there are, when without bound), or all again."""
        if not on:
            self._limit = self._most
            return
        self._limit = max((self._most or len(self._entries)) // 2, 1)
        for key in list(self._entries)[: max(len(self._entries) - self._limit, 0)]:
            del self._entries[key]
            self.evicted += 1

    def clear(self) -> None:
        self._entries.clear()
