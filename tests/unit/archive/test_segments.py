from pathlib import Path

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from service.archive.segments import (
    Envelope,
    encode_line,
    first_sequence,
    recover,
    segment_path,
    segments,
    utc_day,
)


def test_a_day_is_utc() -> None:
    assert utc_day(1_760_130_899_999) == "2025-10-10"
    assert utc_day(1_760_140_800_000) == "2025-10-11"


def test_a_segment_is_named_for_its_first_number(tmp_path: Path) -> None:
    path = segment_path(tmp_path, "fills", "2025-10-10", 51)
    assert path == tmp_path / "fills" / "2025-10-10" / "fills-000000000051.jsonl"
    assert first_sequence(path) == 51


def test_a_record_without_fields_is_still_a_line() -> None:
    assert encode_line(1, 2, b"{}") == b'{"v":1,"seq":1,"archived_ms":2}\n'


def test_segments_come_in_the_order_of_their_numbers_and_nothing_else_is_taken_for_one(
    tmp_path: Path,
) -> None:
    for day, number in (("2025-10-11", 1), ("2025-10-10", 2)):
        path = segment_path(tmp_path, "fills", day, number)
        path.parent.mkdir(parents=True)
        path.touch()
        path.with_name(path.name + ".torn").touch()
        path.with_name(f"orders-{number:012d}.jsonl").touch()
    (tmp_path / "fills" / "notes").mkdir()
    assert [first_sequence(path) for path in segments(tmp_path, "fills")] == [1, 2]


def test_a_stream_without_files_begins_at_one(tmp_path: Path) -> None:
    tail = recover(tmp_path, "fills")
    assert (tail.path, tail.next_sequence, tail.torn_bytes) == (None, 1, 0)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 100_000), min_size=1, max_size=4),
    cut=st.integers(0, 10**6),
)
def test_a_file_cut_anywhere_keeps_exactly_its_whole_lines(
    tmp_path_factory: object, lengths: list[int], cut: int
) -> None:
    directory = tmp_path_factory.mktemp("archive")  # type: ignore[attr-defined]
    path = segment_path(directory, "fills", "2025-10-10", 1)
    path.parent.mkdir(parents=True)
    written = [
        encode_line(n, 0, msgspec.json.encode({"text": "x" * length})) for n, length in enumerate(lengths, 1)
    ]
    data = b"".join(written)
    path.write_bytes(data[: cut % (len(data) + 1)])
    size = path.stat().st_size

    tail = recover(directory, "fills")

    kept = path.read_bytes().splitlines()
    assert data.startswith(path.read_bytes())
    assert [msgspec.json.decode(line, type=Envelope).seq for line in kept] == list(
        range(1, tail.next_sequence)
    )
    assert tail.size_bytes == path.stat().st_size == size - tail.torn_bytes
    assert tail.torn_bytes < max(map(len, written))
