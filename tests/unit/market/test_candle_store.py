"""The memory-mapped candle store: windows in place, one writer, crashes and foreign files."""

import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from service.errors import DataDirectoryUnusable
from service.market import candles as candles_module
from service.market.candles import (
    FIELDS,
    CandleFileInvalid,
    CandleStore,
    CandleStoreFull,
    GapFound,
    candle_problem,
)

STEP = 300_000
START = 1_760_000_100_000 - 1_760_000_100_000 % 3_600_000


def candle(number: int, close: float = 100.0, step: int = STEP):
    return (START + number * step, close, close + 1.0, close - 1.0, close + 0.5, 10.0 + number)


def series(count: int, first: int = 0):
    return [candle(n, 100.0 + n) for n in range(first, first + count)]


def open_store(path: Path, *, capacity: int = 4, kept: int = 20) -> CandleStore:
    return CandleStore.open(path, symbols_capacity=capacity, candles=kept)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "candles.mmap"


@pytest.fixture
def store(path: Path):
    opened = open_store(path)
    yield opened
    opened.close()


def test_a_window_is_a_contiguous_read_only_view_of_the_file(store):
    row = store.add_symbol("BTCUSDT")
    store.append(row, "5m", series(20))

    times, fields = store.window(row, "5m", 5)

    assert times.dtype == np.int64
    assert times.tolist() == [c[0] for c in series(5, 15)]
    assert fields._fields == FIELDS
    for index, values in enumerate(fields, start=1):
        assert values.dtype == np.float64
        assert values.flags.c_contiguous
        assert not values.flags.owndata
        assert not values.flags.writeable
        assert values.tolist() == [c[index] for c in series(5, 15)]


def test_two_windows_share_their_memory_and_talib_reads_them(store):
    import talib

    row = store.add_symbol("BTCUSDT")
    store.append(row, "5m", series(20))
    _, first = store.window(row, "5m", 20)
    _, second = store.window(row, "5m", 10)

    assert np.shares_memory(first.close, second.close)
    assert talib.SMA(first.close, 2)[-1] == pytest.approx((candle(18, 118.0)[4] + candle(19, 119.0)[4]) / 2)


def test_a_window_asks_for_more_than_there_is_and_gets_what_there_is(store):
    row = store.add_symbol("BTCUSDT")
    assert store.window(row, "1h", 50)[0].size == 0
    store.append(row, "5m", series(3))
    assert store.window(row, "5m", 50)[1].close.size == 3


@pytest.mark.parametrize("appended", [1, 19, 20, 21, 28, 29, 33, 60, 500])
def test_the_newest_candles_survive_any_number_of_moves_to_the_front(store, appended):
    row = store.add_symbol("BTCUSDT")
    for one in series(appended):
        store.append(row, "5m", [one])

    times, fields = store.window(row, "5m", 20)
    kept = series(appended)[-20:]
    assert times.tolist() == [c[0] for c in kept]
    assert [list(column) for column in fields] == [[c[i] for c in kept] for i in range(1, 6)]
    assert store.count(row, "5m") == len(kept)
    assert store.last_open_ms(row, "5m") == kept[-1][0]
    assert store.first_open_ms(row, "5m") == kept[0][0]
    assert store.rows_since(row, "5m", 0) == kept


def test_series_and_rows_do_not_touch_each_other(store):
    rows = [store.add_symbol(name) for name in ("A", "B", "C", "D")]
    for row in rows:
        for index, timeframe in enumerate(store.timeframes):
            step = candles_module.TIMEFRAME_MS[timeframe]
            store.append(row, timeframe, [candle(n, 100.0 * row + 10 * index + 5, step) for n in range(45)])
    for row in rows:
        for index, timeframe in enumerate(store.timeframes):
            assert set(store.window(row, timeframe, 20)[1].open.tolist()) == {100.0 * row + 10 * index + 5}


def test_appending_a_candle_again_changes_nothing(store):
    row = store.add_symbol("BTCUSDT")
    assert store.append(row, "5m", series(5)) == 5
    assert store.append(row, "5m", series(6)) == 1
    assert store.append(row, "5m", series(6)) == 0
    assert store.corrected == 0
    assert store.rows_since(row, "5m", 0) == series(6)


def test_a_corrected_candle_replaces_the_old_one_and_is_counted(store):
    row = store.add_symbol("BTCUSDT")
    store.append(row, "5m", series(30))
    assert store.append(row, "5m", [candle(25, 50.0)]) == 0
    assert store.corrected == 1
    assert store.rows_since(row, "5m", candle(25)[0], 1) == [candle(25, 50.0)]
    store.append(row, "5m", [candle(2, 50.0)])  # older than the series reaches
    assert store.corrected == 1
    assert len(store.rows_since(row, "5m", 0)) == 20


def test_a_gap_is_reported_after_appending_what_precedes_it(store):
    row = store.add_symbol("BTCUSDT")
    store.append(row, "5m", series(3))
    with pytest.raises(GapFound) as gap:
        store.append(row, "5m", [candle(3), candle(5)])
    assert (gap.value.expected_ms, gap.value.found_ms, gap.value.appended) == (
        candle(4)[0],
        candle(5)[0],
        1,
    )
    assert store.count(row, "5m") == 4
    assert store.sequence(row) % 2 == 0


@pytest.mark.parametrize(
    "bad",
    [
        (START + 1, 1.0, 1.0, 1.0, 1.0, 1.0),
        (0, 1.0, 1.0, 1.0, 1.0, 1.0),
        (START, 1.0, 0.5, 0.4, 0.45, 1.0),
        (START, 1.0, 2.0, 1.5, 1.7, 1.0),
        (START, 0.0, 0.0, 0.0, 0.0, 1.0),
        (START, float("nan"), 2.0, 1.0, 1.0, 1.0),
        (START, 1.0, float("inf"), 1.0, 1.0, 1.0),
        (START, 1.0, 2.0, 1.0, float("nan"), 1.0),
        (START, 1.0, 2.0, 1.0, 1.0, -1.0),
        (START, 1.0, 2.0, 1.0, 1.0, float("nan")),
    ],
)
def test_a_malformed_candle_is_refused_and_nothing_is_written(store, bad):
    row = store.add_symbol("BTCUSDT")
    assert candle_problem(bad, STEP)
    before = store.sequence(row)
    with pytest.raises(ValueError, match="candle"):
        store.append(row, "5m", [bad])
    assert store.count(row, "5m") == 0
    assert store.sequence(row) == before


def test_rows_since_starts_at_the_first_candle_that_opens_then(store):
    row = store.add_symbol("BTCUSDT")
    store.append(row, "5m", series(10))
    assert store.rows_since(row, "5m", candle(7)[0]) == series(3, 7)
    assert store.rows_since(row, "5m", candle(7)[0] + 1) == series(2, 8)
    assert store.rows_since(row, "5m", candle(10)[0]) == []
    assert store.rows_since(row, "5m", candle(99)[0]) == []
    assert store.rows_since(row, "5m", candle(2)[0], 3) == series(3, 2)


def test_the_forming_candle_is_apart_from_the_closed_ones(store):
    row = store.add_symbol("BTCUSDT")
    assert store.forming(row, "5m") is None
    store.set_forming(row, "5m", candle(9))
    assert store.forming(row, "5m") == candle(9)
    assert store.forming(row, "15m") is None
    assert store.count(row, "5m") == 0


def test_symbols_with_any_letters_keep_their_row_across_a_restart(path):
    store = open_store(path)
    store.add_symbol("BTCUSDT")
    row = store.add_symbol("币安人生USDT")
    store.append(row, "5m", series(3))
    store.close()

    again = open_store(path)
    assert again.symbols() == [(0, "BTCUSDT"), (1, "币安人生USDT")]
    assert again.row_of("币安人生USDT") == row
    assert again.rows_since(row, "5m", 0) == series(3)
    again.close()


def test_a_freed_row_is_reused_empty_and_its_sequence_moved_on(store):
    rows = [store.add_symbol(name) for name in ("A", "B", "C", "D")]
    store.append(rows[1], "5m", series(3))
    store.set_forming(rows[1], "5m", candle(3))
    with pytest.raises(CandleStoreFull):
        store.add_symbol("E")
    before = store.sequence(rows[1])
    store.remove_symbol("B")
    store.remove_symbol("never there")
    assert store.row_of("B") is None
    assert store.add_symbol("E") == rows[1]
    assert store.symbol_of(rows[1]) == "E"
    assert store.count(rows[1], "5m") == 0
    assert store.forming(rows[1], "5m") is None
    assert store.sequence(rows[1]) > before


@pytest.mark.parametrize("name", ["", "X" * 59, "币" * 20])
def test_a_name_that_does_not_fit_is_refused(store, name):
    with pytest.raises(ValueError, match="a symbol has"):
        store.add_symbol(name)


def test_every_change_of_a_row_moves_its_sequence_to_the_next_even_number(store):
    row = store.add_symbol("BTCUSDT")
    before = store.sequence(row)
    store.append(row, "5m", series(3))
    store.set_forming(row, "5m", candle(3))
    assert store.sequence(row) == before + 2
    store.replace(row, "5m", series(2, 50))
    assert store.sequence(row) == before + 6
    assert store.rows_since(row, "5m", 0) == series(2, 50)


def test_another_process_sees_what_is_appended_after_it_attached(path):
    store = open_store(path)
    row = store.add_symbol("币安人生USDT")
    code = (
        "import sys; from pathlib import Path; from service.market.candles import CandleStore\n"
        "store = CandleStore.attach(Path(sys.argv[1])); row = store.row_of('币安人生USDT')\n"
        "print(row, store.count(row, '5m'), flush=True)\n"
        "sys.stdin.readline()\n"
        "_, fields = store.window(row, '5m', 5)\n"
        "print(store.sequence(row), store.row_of('LATE'), *fields.close.tolist(), flush=True)\n"
    )
    reader = subprocess.Popen(
        [sys.executable, "-c", code, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
        env={**os.environ, "PYTHONUTF8": "1"},
    )
    with reader:
        assert reader.stdout.readline().split() == [str(row), "0"]
        store.append(row, "5m", series(40))
        late = store.add_symbol("LATE")
        reader.stdin.write("\n")
        reader.stdin.flush()
        sequence, seen_late, *closes = reader.stdout.readline().split()
    assert int(sequence) == store.sequence(row)
    assert int(seen_late) == late
    assert [float(c) for c in closes] == [c[4] for c in series(5, 35)]
    store.close()


def test_a_version_grows_with_its_own_series_only(store):
    row, other = store.add_symbol("A"), store.add_symbol("B")
    store.append(row, "5m", series(20))
    store.append(row, "15m", [candle(n, step=900_000) for n in range(5)])

    def versions():
        return [store.version(one, timeframe) for one in (row, other) for timeframe in ("5m", "15m", "1h")]

    before = versions()
    store.append(row, "5m", [candle(20)])
    store.append(row, "15m", [candle(3, close=50.0, step=900_000)])  # the venue corrects an old one
    store.append(row, "5m", [candle(20), candle(0, close=7.0)])  # known, and older than the series
    store.set_forming(row, "15m", candle(5, step=900_000))
    after = versions()
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, 1, 0, 0, 0, 0]


def test_a_candle_before_a_gap_gives_a_new_version_too(store):
    row = store.add_symbol("A")
    store.append(row, "5m", series(3))
    before = store.version(row, "5m")
    with pytest.raises(GapFound):
        store.append(row, "5m", [candle(3), candle(9)])
    assert store.version(row, "5m") > before


@pytest.mark.parametrize(
    "change",
    [
        lambda store, row: store.replace(row, "5m", []),
        lambda store, row: store.replace(row, "5m", series(20)),
        lambda store, row: store.clear(row),
        lambda store, row: store.remove_symbol("A"),
        lambda store, row: (store.remove_symbol("A"), store.add_symbol("B")),
    ],
)
def test_a_series_that_is_emptied_replaced_or_given_away_never_has_an_earlier_version_again(store, change):
    row = store.add_symbol("A")
    seen = {store.version(row, "5m")}
    for number in range(20):
        store.append(row, "5m", [candle(number)])
        seen.add(store.version(row, "5m"))
    change(store, row)
    assert store.version(row, "5m") not in seen
    store.append(row, "5m", [candle(20)])
    assert store.version(row, "5m") not in seen


def test_versions_go_on_where_they_were_after_a_restart(path):
    store = open_store(path)
    store.append(store.add_symbol("A"), "5m", series(7))
    before = store.version(0, "5m")
    store.close()
    again = open_store(path)
    assert again.version(0, "5m") == before
    again.close()


def test_a_file_of_the_version_before_is_set_aside(path):
    store = open_store(path)
    store.append(store.add_symbol("A"), "5m", series(3))
    store.close()
    with path.open("r+b") as file:
        file.seek(8)
        file.write(struct.pack("=I", candles_module._VERSION - 1))
    with pytest.raises(CandleFileInvalid, match="it has version 1, this is version 2"):
        CandleStore.attach(path)
    again = open_store(path)
    assert (again.symbols(), path.with_name("candles.mmap.bad-1").exists()) == ([], True)
    again.close()


def test_a_reader_cannot_write(path):
    store = open_store(path)
    row = store.add_symbol("BTCUSDT")
    reader = CandleStore.attach(path)
    with pytest.raises(TypeError):
        reader.append(row, "5m", series(1))
    reader.close()
    store.close()


def test_a_window_outlives_the_store_it_came_from(path):
    store = open_store(path)
    row = store.add_symbol("BTCUSDT")
    store.append(row, "5m", series(20))
    _, fields = store.window(row, "5m", 20)
    store.close()
    assert fields.close[-1] == candle(19, 119.0)[4]


def test_the_writer_needs_no_numpy(path):
    code = (
        "import sys; from pathlib import Path; from service.market.candles import CandleStore\n"
        "store = CandleStore.open(Path(sys.argv[1]), symbols_capacity=2, candles=20)\n"
        "row = store.add_symbol('A'); store.append(row, '5m', [(300000, 1.0, 1.0, 1.0, 1.0, 1.0)])\n"
        "store.rows_since(row, '5m', 0); store.close(); assert 'numpy' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)


def kill_while_writing(path: Path, rows_left_odd: bool) -> None:
    code = (
        "import os, sys; from pathlib import Path; from service.market.candles import CandleStore\n"
        "store = CandleStore.open(Path(sys.argv[1]), symbols_capacity=4, candles=20)\n"
        "for name in ('A', 'B'):\n"
        "    row = store.add_symbol(name)\n"
        "    store.append(row, '5m', [(300000 * n, 1.0, 1.0, 1.0, 1.0, 1.0) for n in range(1, 31)])\n"
        "if sys.argv[2] == 'odd':\n"
        "    store._slide = lambda *a: os.kill(os.getpid(), 9)\n"
        "    store.append(row, '5m', [(300000 * n, 1.0, 1.0, 1.0, 1.0, 1.0) for n in range(31, 99)])\n"
        "os.kill(os.getpid(), 9)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(path), "odd" if rows_left_odd else "even"])
    assert killed.returncode == -signal.SIGKILL


def test_a_killed_writer_loses_nothing_that_was_appended(path):
    kill_while_writing(path, rows_left_odd=False)
    store = open_store(path)
    assert [store.count(row, "5m") for row, _ in store.symbols()] == [20, 20]
    store.close()


def test_a_writer_killed_inside_an_append_loses_that_row_only(path):
    kill_while_writing(path, rows_left_odd=True)
    store = open_store(path)
    assert [(name, store.count(row, "5m")) for row, name in store.symbols()] == [("A", 20), ("B", 0)]
    assert all(store.sequence(row) % 2 == 0 for row, _ in store.symbols())
    store.close()


def test_candles_are_dropped_when_the_machine_went_down_with_the_file_open(path, monkeypatch):
    kill_while_writing(path, rows_left_odd=False)
    monkeypatch.setattr(candles_module, "boot_id", lambda: "another boot")
    store = open_store(path)
    assert [(name, store.count(row, "5m")) for row, name in store.symbols()] == [("A", 0), ("B", 0)]
    store.close()


def test_candles_survive_a_reboot_after_an_orderly_close(path, monkeypatch):
    store = open_store(path)
    store.append(store.add_symbol("A"), "5m", series(3))
    store.close()
    monkeypatch.setattr(candles_module, "boot_id", lambda: "another boot")
    again = open_store(path)
    assert again.rows_since(0, "5m", 0) == series(3)
    again.close()


@pytest.mark.parametrize("change", [{"kept": 24}, {"capacity": 5}])
def test_a_file_of_another_layout_is_set_aside_and_rebuilt(path, change):
    store = open_store(path)
    store.append(store.add_symbol("A"), "5m", series(3))
    store.close()
    other = open_store(path, **change)
    assert other.symbols() == []
    assert path.with_name("candles.mmap.bad-1").exists()
    other.close()


def test_a_file_with_more_rows_than_asked_is_kept(path):
    store = open_store(path)
    store.append(store.add_symbol("A"), "5m", series(3))
    store.close()
    smaller = open_store(path, capacity=2)
    assert smaller.rows_since(0, "5m", 0) == series(3)
    smaller.close()


@pytest.mark.parametrize(
    ("offset", "content"),
    [(0, b"garbage!"), (8, struct.pack("=I", 99)), (12, struct.pack("=I", 3)), (40, b"\xff")],
)
def test_a_damaged_header_is_set_aside_and_rebuilt(path, offset, content):
    open_store(path).close()
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)
    with pytest.raises(CandleFileInvalid):
        CandleStore.attach(path)
    store = open_store(path)
    assert store.symbols() == []
    assert path.with_name("candles.mmap.bad-1").exists()
    store.close()


@pytest.mark.parametrize("size", [0, 10, 5000])
def test_a_file_cut_short_is_set_aside_and_rebuilt(path, size):
    open_store(path).close()
    os.truncate(path, size)
    store = open_store(path)
    assert path.with_name("candles.mmap.bad-1").stat().st_size == size
    store.close()


def test_only_the_newest_files_set_aside_are_kept(path):
    for kept in (20, 24, 28, 32, 36, 40):
        open_store(path, kept=kept).close()
    aside = sorted(p.name for p in path.parent.iterdir() if ".bad-" in p.name)
    assert aside == ["candles.mmap.bad-3", "candles.mmap.bad-4", "candles.mmap.bad-5"]


def test_a_damaged_series_is_emptied_and_the_others_are_kept(path):
    store = open_store(path)
    for name in ("A", "B"):
        store.append(store.add_symbol(name), "5m", series(20))
    at = store._series(0, 0) * 8 + 3 * store._layout.slots * 8  # a low of A
    store.close()
    with path.open("r+b") as file:
        file.seek(at + 8)
        file.write(struct.pack("=d", -1.0))
    again = open_store(path)
    assert [again.count(row, "5m") for row, _ in again.symbols()] == [0, 20]
    again.close()


def test_a_damaged_name_frees_its_row(path):
    store = open_store(path)
    for name in ("AAA", "BBB"):
        store.append(store.add_symbol(name), "5m", series(20))
    store.close()
    with path.open("r+b") as file:
        file.seek(4096 + 2)
        file.write(b"Z")
    again = open_store(path)
    assert again.symbols() == [(1, "BBB")]
    assert again.add_symbol("CCC") == 0
    assert again.count(0, "5m") == 0
    again.close()


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(DataDirectoryUnusable, match="nowhere"):
        open_store(tmp_path / "nowhere" / "candles.mmap")


def test_a_full_disk_is_found_at_the_start(path, monkeypatch):
    def no_room(descriptor: int, start: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", no_room)
    with pytest.raises(DataDirectoryUnusable, match="No space left"):
        open_store(path)


def test_the_file_is_small_and_its_blocks_are_claimed(path):
    store = CandleStore.open(path, symbols_capacity=200, candles=200)
    needed = 200 * 3 * 6 * 8 * 200
    assert needed < store.bytes < needed * 1.2
    assert path.stat().st_blocks * 512 >= store.bytes
    store.close()
