"""Entries in memory: least recently used first, in time, and not flushed by a scan."""

from collections import OrderedDict

import pytest

from service.learning.memory_tier import MemoryTier

TTL_MS = 1_000


def tier(limit: int = 3) -> "MemoryTier[str, int]":
    return MemoryTier(limit, TTL_MS)


def one_pass(memory: "MemoryTier[int, int]", keys: range, now_ms: int = 0) -> int:
    """Ask for every key once, then put what was missing, as a cycle does. Returns the hits."""
    memory.begin_pass()
    missing = [key for key in keys if memory.get(key, now_ms) is None]
    for key in missing:
        memory.put(key, key, now_ms)
    return len(keys) - len(missing)


def test_a_cyclic_scan_larger_than_the_memory_hits_as_often_as_there_is_room() -> None:
    memory: MemoryTier[int, int] = MemoryTier(100, TTL_MS)
    hits = [one_pass(memory, range(200)) for _ in range(5)]
    assert hits == [0, 100, 100, 100, 100]


def test_a_plain_lru_would_never_hit_in_that_scan() -> None:
    plain: OrderedDict[int, int] = OrderedDict()
    hits = 0
    for key in [*range(200)] * 5:
        if key in plain:
            hits += 1
            plain.move_to_end(key)
            continue
        plain[key] = key
        if len(plain) > 100:
            plain.popitem(last=False)
    assert hits == 0


def test_entries_of_a_new_candle_take_the_places_of_the_last_ones() -> None:
    memory: MemoryTier[int, int] = MemoryTier(100, TTL_MS)
    one_pass(memory, range(200))
    assert one_pass(memory, range(1000, 1200)) == 0
    assert one_pass(memory, range(1000, 1200)) == 100
    assert len(memory) == 100


def test_the_least_recently_used_goes_first() -> None:
    memory = tier()
    for key in "abc":
        memory.put(key, 1, 0)
    memory.begin_pass()
    memory.get("a", 0)
    assert memory.put("d", 1, 0)
    assert [key for key in "abcd" if memory.get(key, 0)] == ["a", "c", "d"]
    assert memory.evicted == 1


def test_an_entry_ends_with_its_time() -> None:
    memory = tier()
    memory.put("a", 1, 5_000)
    assert memory.get("a", 5_000 + TTL_MS - 1) == 1
    assert memory.get("a", 5_000 + TTL_MS) is None
    assert len(memory) == 0


def test_a_clock_that_stepped_back_makes_entries_misses_and_not_immortal() -> None:
    memory = tier()
    memory.put("a", 1, 3_600_000)
    assert memory.get("a", 0) is None
    memory.put("b", 1, 3_600_000)
    memory.sweep(0)
    assert len(memory) == 0


def test_without_a_bound_only_time_ends_an_entry() -> None:
    memory = tier(limit=0)
    for number in range(500):
        memory.put(str(number), 1, 0)
    assert len(memory) == 500
    memory.sweep(TTL_MS)
    assert len(memory) == 0


@pytest.mark.parametrize(("limit", "held", "kept"), [(4, 4, 2), (0, 10, 5), (1, 1, 1)])
def test_a_shrunken_memory_keeps_the_half_used_last_and_grows_again(limit: int, held: int, kept: int) -> None:
    memory = tier(limit)
    for number in range(held):
        memory.put(str(number), 1, 0)
    memory.shrink(True)
    assert [n for n in range(held) if memory.get(str(n), 0)] == list(range(held - kept, held))
    memory.begin_pass()
    for number in range(held):
        memory.put(f"new{number}", 1, 0)
    assert len(memory) == kept
    memory.shrink(False)
    memory.begin_pass()
    for number in range(held):
        memory.put(f"newer{number}", 1, 0)
    assert len(memory) >= held
