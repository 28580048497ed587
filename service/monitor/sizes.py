"""How many bytes a part holds, counted by walking what it holds; large containers by a sample."""

import sys
from array import array
from collections import deque
from collections.abc import Iterable
from itertools import islice

import msgspec

_SAMPLE = 200
_DEPTH_LIMIT = 12
_SCALARS = (str, bytes, bytearray, int, float, complex)


def held_bytes(part: object, *, within: str = "") -> int:
    """Bytes of a part: its containers, records, arrays and its helpers of its own module.

    What belongs to other parts is not followed. Of containers beyond 200 items the first 200 stand for all.

    Args: within: prefix of the modules whose objects are the part's own; default: its class's module.
    """
    return _Walk(within or type(part).__module__).size(part, 0)


class _Walk:
    def __init__(self, within: str) -> None:
        self._within = within
        self._seen: set[int] = set()

    def size(self, value: object, depth: int) -> int:
        if value is None or isinstance(value, bool) or id(value) in self._seen or depth > _DEPTH_LIMIT:
            return 0
        if isinstance(value, _SCALARS):
            self._seen.add(id(value))
            return sys.getsizeof(value)
        children = self._children(value)
        if children is None:
            return 0
        self._seen.add(id(value))
        items, count = children
        sample = list(islice(items, _SAMPLE))
        below = sum(self.size(item, depth + 1) for item in sample)
        return sys.getsizeof(value) + (below * count // len(sample) if sample else 0)

    def _children(self, value: object) -> tuple[Iterable[object], int] | None:
        """What a value holds and how much of it; None for what is not the part's own."""
        if isinstance(value, dict):
            return (item for pair in value.items() for item in pair), 2 * len(value)
        if isinstance(value, list | tuple | set | frozenset | deque):
            return value, len(value)
        if isinstance(value, array):
            return (), 0
        if isinstance(value, msgspec.Struct):
            fields = value.__struct_fields__
            return [getattr(value, name) for name in fields], len(fields)
        if type(value).__module__.startswith(self._within):
            held = getattr(value, "__dict__", None)
            if held is None:
                names = getattr(type(value), "__slots__", ())
                held = {name: getattr(value, name) for name in names if hasattr(value, name)}
            return list(held.values()), len(held)
        return None
