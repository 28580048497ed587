from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.archive.journal import TORN_NAME, Journal, open_journal
from service.errors import DataDirectoryUnusable

CAPACITY = 65_536


def reopened(directory: Path) -> tuple[Journal, list[tuple[str, int, bytes]]]:
    """The journal as the next process finds it, and what it holds."""
    journal = open_journal(directory, CAPACITY)
    journal.recover()
    entries, _ = journal.read(journal.start, journal.end, CAPACITY)
    return journal, [(entry.stream, entry.sequence, entry.line) for entry in entries]


def test_a_fresh_journal_takes_its_space_and_holds_nothing(tmp_path: Path) -> None:
    journal, held = reopened(tmp_path)
    assert held == []
    assert (tmp_path / "journal").stat().st_blocks * 512 >= CAPACITY
    assert journal.used_bytes == journal.torn_bytes == 0
    journal.close()


@settings(max_examples=40, deadline=None)
@given(
    steps=st.lists(st.tuples(st.integers(0, 8_000), st.booleans()), max_size=60),
)
def test_what_is_not_released_is_found_again_in_order_however_often_the_ring_went_round(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, bool]]
) -> None:
    directory = tmp_path_factory.mktemp("journal")
    journal = open_journal(directory, CAPACITY)
    kept: list[tuple[int, tuple[str, int, bytes]]] = []
    for sequence, (length, release) in enumerate(steps, 1):
        line = bytes([sequence % 256]) * length
        position = journal.append(b"orders", sequence, line, use_reserve=True)
        while position < 0:  # full: the oldest becomes durable
            del kept[0]
            journal.release(kept[0][0] if kept else journal.end)
            position = journal.append(b"orders", sequence, line, use_reserve=True)
        kept.append((position, ("orders", sequence, line)))
        if release:
            del kept[: len(kept) // 2 + 1]
            journal.release(kept[0][0] if kept else journal.end)
    # not closed: a killed process closes nothing

    again, held = reopened(directory)

    assert held == [entry for _, entry in kept]
    assert again.torn_bytes == 0
    again.close()
    journal.close()


def test_the_reserve_is_room_only_while_the_disk_refuses(tmp_path: Path) -> None:
    journal = open_journal(tmp_path, CAPACITY)
    line = b"x" * 1_000
    while journal.append(b"orders", 1, line, use_reserve=False) >= 0:
        pass
    assert CAPACITY // 4 - 2_000 < CAPACITY - journal.used_bytes < CAPACITY // 4 + 2_000
    assert journal.append(b"orders", 1, line, use_reserve=True) >= 0
    journal.close()


def test_a_torn_tail_is_cut_and_kept_aside(tmp_path: Path) -> None:
    journal = open_journal(tmp_path, CAPACITY)
    for sequence in (1, 2, 3):
        last = journal.append(b"orders", sequence, b"line %d\n" % sequence, use_reserve=False)
    journal.close()
    place = 4_096 + last % CAPACITY + 40
    data = bytearray((tmp_path / "journal").read_bytes())
    data[place : place + 4] = b"\0\0\0\0"
    (tmp_path / "journal").write_bytes(data)

    again, held = reopened(tmp_path)

    assert [sequence for _, sequence, _ in held] == [1, 2]
    assert again.torn_bytes == 48
    assert b" 3\n" in (tmp_path / TORN_NAME).read_bytes()
    again.append(b"orders", 3, b"line 3 again\n", use_reserve=False)
    again.close()
    _, held = reopened(tmp_path)
    assert [line for _, _, line in held] == [b"line 1\n", b"line 2\n", b"line 3 again\n"]


def test_a_damaged_entry_in_the_middle_is_set_aside_and_those_behind_it_count(tmp_path: Path) -> None:
    journal = open_journal(tmp_path, CAPACITY)
    positions = [journal.append(b"fills", n, b"line %d\n" % n, use_reserve=False) for n in (1, 2, 3)]
    journal.close()
    data = bytearray((tmp_path / "journal").read_bytes())
    data[4_096 + positions[1] % CAPACITY + 41] ^= 0xFF
    (tmp_path / "journal").write_bytes(data)

    again, held = reopened(tmp_path)
    assert [sequence for _, sequence, _ in held] == [1, 3]
    assert again.torn_bytes == 48
    again.close()
    again, held = reopened(tmp_path)
    assert [sequence for _, sequence, _ in held] == [1, 3]
    assert again.torn_bytes == 0, "what was set aside is not found damaged again"
    again.close()


def damaged_journal(directory: Path, places: dict[int, bytes]) -> None:
    path = directory / "journal"
    data = bytearray(path.read_bytes())
    for place, content in places.items():
        data[4_096 + place : 4_096 + place + len(content)] = content
    path.write_bytes(data)


FIELDS = {"checksum": 0, "length": 4, "position": 8, "sequence": 16, "stream": 24, "line": 41}


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("damaged", [[1], [2, 3], [1, 3, 5], [6]])
def test_whichever_part_of_an_entry_is_damaged_every_whole_one_counts(
    tmp_path: Path, field: str, damaged: list[int]
) -> None:
    journal = open_journal(tmp_path, CAPACITY)
    places = {
        n: journal.append(b"fills", n, b"line %d " % n * 30, use_reserve=False) % CAPACITY
        for n in range(1, 7)
    }
    journal.close()
    damaged_journal(tmp_path, {places[n] + FIELDS[field]: b"\x05\x01" for n in damaged})
    whole = [n for n in places if n not in damaged]

    again, held = reopened(tmp_path)

    assert [sequence for _, sequence, _ in held] == whole
    if damaged != [6] or field not in ("position", "length"):
        kept = (tmp_path / TORN_NAME).read_bytes()
        assert len(kept) == again.torn_bytes == sum(_size(n) for n in damaged)
    position = again.append(b"fills", 7, b"line 7\n", use_reserve=False)
    assert position >= again.start
    again.close()
    again, held = reopened(tmp_path)
    assert [sequence for _, sequence, _ in held] == [*whole, 7]
    assert again.torn_bytes == 0, "what was set aside is not found damaged again"
    again.close()


def _size(number: int) -> int:
    return (40 + len(b"line %d " % number * 30) + 7) // 8 * 8


def test_entries_behind_a_damaged_one_count_beyond_the_rings_end(tmp_path: Path) -> None:
    journal = open_journal(tmp_path, CAPACITY)
    while journal.end % CAPACITY < CAPACITY - 5_000:
        last = journal.append(b"fills", 1, b"x" * 1_000, use_reserve=True)
    journal.release(last)
    positions = [journal.append(b"fills", n, b"y" * 1_500, use_reserve=True) for n in range(2, 8)]
    assert sorted(positions, key=lambda position: position % CAPACITY) != positions, "they go round"
    journal.close()
    # All but the first and the last, and the padding between them.
    damaged_journal(tmp_path, {position % CAPACITY + 8: b"\xff" * 4 for position in positions[1:-1]})

    again, held = reopened(tmp_path)

    assert [sequence for _, sequence, _ in held] == [1, 2, 7]
    again.close()


def test_one_damaged_superblock_of_two_is_no_loss(tmp_path: Path) -> None:
    journal = open_journal(tmp_path, CAPACITY)
    first = journal.append(b"fills", 1, b"one\n", use_reserve=False)
    second = journal.append(b"fills", 2, b"two\n", use_reserve=False)
    assert first < second
    journal.release(second)
    journal.close()
    data = bytearray((tmp_path / "journal").read_bytes())
    data[2 * 0 : 64] = b"\xff" * 64  # the newer one: the older still starts at the first record
    (tmp_path / "journal").write_bytes(data)
    again, held = reopened(tmp_path)
    assert [sequence for _, sequence, _ in held] == [1, 2]
    again.close()


def test_an_empty_journal_takes_a_new_size_and_a_full_one_keeps_its_own(tmp_path: Path) -> None:
    open_journal(tmp_path, CAPACITY).close()
    journal = open_journal(tmp_path, 2 * CAPACITY)
    assert journal.capacity == 2 * CAPACITY
    journal.append(b"fills", 1, b"one\n", use_reserve=False)
    journal.close()
    again = open_journal(tmp_path, CAPACITY)
    assert again.capacity == 2 * CAPACITY
    again.close()


def test_a_journal_without_a_readable_head_is_kept_aside(tmp_path: Path) -> None:
    (tmp_path / "journal").write_bytes(b"something else")
    journal, held = reopened(tmp_path)
    assert held == []
    assert (tmp_path / "journal.unreadable").read_bytes() == b"something else"
    journal.close()


def test_a_place_without_a_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataDirectoryUnusable, match="journal"):
        open_journal(tmp_path / "nowhere", CAPACITY)
