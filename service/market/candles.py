"""The candle store: every series of the market in one memory-mapped file, read in place by the workers.

The daemon writes through `memoryview` and never needs numpy; readers get numpy views on the same pages.
A symbol owns a row; a row holds, per timeframe, six series of 8-byte values: open time (int64, ms) and
open, high, low, close, volume (float64). Layout, every part on an 8-byte boundary:

    header     4096 bytes: magic, version, sizes, timeframes, CRC-32; then clean mark, generation, boot id,
               and a random mark that tells this file from any other
    symbols    [row] 64 bytes: length, UTF-8 name, CRC-32
    state      [row] sequence, then [timeframe] (end slot, count, version), int64
    forming    [row][timeframe][6]
    series     [row][timeframe][6][slot]

A series has a thirty-second more slots than candles, at least eight. Candles are written at its end; when it
is full the newest are moved to its front, so a window is always one contiguous slice, at 1/32 more memory
and one small move per `candles / 32` appends. Pages of rows that are not used are never touched and cost
no memory.

Readers in other processes see each change at once. A row's sequence is odd while it is written: read it
before and after using a window, and retry when it changed or was odd. Aligned 8-byte stores are atomic.
A series' version grows when its candles change, so that what was computed from one series outlives a
candle of another; it never falls while the file is open, whoever owns the row.
"""

import errno
import math
import mmap
import os
import re
import struct
import sys
import zlib
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from service.errors import DataDirectoryUnusable, PerpdError
from service.ports import CandleRow
from service.records import TIMEFRAME_MS, TIMEFRAMES, Record

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Times = npt.NDArray[np.int64]
    Values = npt.NDArray[np.float64]

FIELDS = ("open", "high", "low", "close", "volume")
FILE_NAME = "candles.mmap"

_MAGIC = b"PERPDCND"
_VERSION = 2
_HEADER_BYTES = 4096
_PREFIX = struct.Struct("=8sIIIII")  # magic, version, capacity, candles, slots, number of timeframes
_CRC = struct.Struct("=I")
_TIMEFRAME_BYTES = 8
_CLEAN_WORD = 256 // 8  # 1 after an orderly close, 0 while a daemon has the file
_GENERATION_WORD = 264 // 8  # grows with each change of the symbol table
_BOOT_AT, _BOOT_BYTES = 272, 64
_MARK_AT, _MARK_BYTES = 336, 32
_SYMBOL_BYTES, _NAME_BYTES = 64, 58
_SERIES = 1 + len(FIELDS)
_STATE = 3  # words of a series' state: end slot, count, version
_KEPT_ASIDE = 3

RawBytes = bytes  # inside the class, `bytes` is its property


class GapFound(PerpdError):
    """A candle does not follow the newest one of its series; those before it were appended."""

    def __init__(self, *, expected_ms: int, found_ms: int, appended: int) -> None:
        super().__init__(f"expected the candle opening at {expected_ms}, found {found_ms}")
        self.expected_ms = expected_ms
        self.found_ms = found_ms
        self.appended = appended


class CandleStoreFull(PerpdError):
    """Every row of the candle store belongs to a symbol."""


class CandleFileInvalid(PerpdError):
    """The candle file is missing, damaged, or of another layout."""


class Fields(NamedTuple):
    """float64[count] views of one window, in the order of FIELDS, oldest first; read-only."""

    open: "Values"
    high: "Values"
    low: "Values"
    close: "Values"
    volume: "Values"


class Layout(NamedTuple):
    """The sizes of a candle file; all offsets follow from them."""

    capacity: int
    candles: int
    slots: int
    timeframes: tuple[str, ...]

    @property
    def state_words(self) -> int:
        return 1 + _STATE * len(self.timeframes)

    @property
    def state_at(self) -> int:
        return _HEADER_BYTES + self.capacity * _SYMBOL_BYTES

    @property
    def forming_at(self) -> int:
        return self.state_at + self.capacity * self.state_words * 8

    @property
    def series_at(self) -> int:
        end = self.forming_at + self.capacity * len(self.timeframes) * _SERIES * 8
        return -(-end // mmap.PAGESIZE) * mmap.PAGESIZE

    @property
    def file_bytes(self) -> int:
        return self.series_at + self.capacity * len(self.timeframes) * _SERIES * self.slots * 8

    def encode(self) -> bytes:
        names = b"".join(t.encode().ljust(_TIMEFRAME_BYTES, b"\0") for t in self.timeframes)
        sizes = (self.capacity, self.candles, self.slots, len(self.timeframes))
        body = _PREFIX.pack(_MAGIC, _VERSION, *sizes) + names
        return body + _CRC.pack(zlib.crc32(body))

    @classmethod
    def decode(cls, header: bytes) -> "Layout":
        """Raises CandleFileInvalid."""
        if len(header) < _PREFIX.size:
            raise CandleFileInvalid("the header is cut short")
        magic, version, capacity, candles, slots, timeframes = _PREFIX.unpack_from(header)
        if magic != _MAGIC:
            raise CandleFileInvalid("it is not a candle file")
        if version != _VERSION:
            raise CandleFileInvalid(f"it has version {version}, this is version {_VERSION}")
        end = _PREFIX.size + timeframes * _TIMEFRAME_BYTES
        if end + _CRC.size > len(header) or _CRC.unpack_from(header, end)[0] != zlib.crc32(header[:end]):
            raise CandleFileInvalid("the header's checksum is wrong")
        names = header[_PREFIX.size : end]
        return cls(
            capacity,
            candles,
            slots,
            tuple(
                names[i : i + _TIMEFRAME_BYTES].rstrip(b"\0").decode()
                for i in range(0, len(names), _TIMEFRAME_BYTES)
            ),
        )


class Header(Record, frozen=True, kw_only=True):
    """What tells a candle file from any other, and a moment of its life from an earlier one."""

    mark: str  # given when the file was made
    capacity: int  # rows
    candles: int  # per series
    timeframes: tuple[str, ...]
    generation: int  # grows with each opening and each change of the symbol table
    boot: str  # id of the boot in which it was last opened for writing


def read_header(path: Path) -> Header | None:
    """The header of a file that nobody has opened; None where there is none. Raises CandleFileInvalid."""
    try:
        with path.open("rb") as file:
            raw = file.read(_HEADER_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CandleFileInvalid(f"{path}: {error.strerror or error}") from error
    layout = Layout.decode(raw)
    if len(raw) < _HEADER_BYTES:
        raise CandleFileInvalid("the header is cut short")
    return _header(layout, memoryview(raw))


def _header(layout: Layout, header: memoryview) -> Header:
    def text(at: int, size: int) -> str:
        return bytes(header[at : at + size]).rstrip(b"\0").decode("ascii", "replace")

    at = _GENERATION_WORD * 8
    return Header(
        mark=text(_MARK_AT, _MARK_BYTES),
        capacity=layout.capacity,
        candles=layout.candles,
        timeframes=layout.timeframes,
        generation=int.from_bytes(header[at : at + 8], sys.byteorder, signed=True),
        boot=text(_BOOT_AT, _BOOT_BYTES),
    )


def candle_problem(row: CandleRow, step_ms: int) -> str:
    """What is wrong with a candle, in words; "" for a sound one. `step_ms` is its timeframe's length."""
    open_ms, open_, high, low, close, volume = row
    if open_ms <= 0 or open_ms % step_ms:
        return "off the time grid"
    if not (0.0 < low <= open_ <= high < math.inf and low <= close <= high):
        return "prices out of order"
    if not 0.0 <= volume < math.inf:
        return "negative or infinite volume"
    return ""


class CandleStore:
    """Closed candles of many symbols, and the forming one apart. One writer, any number of readers."""

    def __init__(self, path: Path, memory: mmap.mmap, layout: Layout, *, writable: bool) -> None:
        """For `open` and `attach` only."""
        self.path = path
        self.corrected = 0  # closed candles whose values the venue changed afterwards
        self._map = memory
        self._layout = layout
        self._writable = writable
        self._bytes = memoryview(memory)
        self._q = self._bytes.cast("q")  # the file as int64 words
        self._d = self._bytes.cast("d")  # the same words as float64
        self._timeframe = {name: i for i, name in enumerate(layout.timeframes)}
        self._steps = tuple(TIMEFRAME_MS[name] for name in layout.timeframes)
        self._state_at, self._state_words = layout.state_at // 8, layout.state_words
        self._series_at = layout.series_at // 8
        self._slots = layout.slots
        self._series_words = _SERIES * layout.slots
        self._row_words = len(self._steps) * self._series_words
        self._read_state = struct.Struct(f"={layout.state_words}q").unpack_from
        self.count_at = {name: 2 + _STATE * i for name, i in self._timeframe.items()}  # in a `state`
        self.version_at = {name: 3 + _STATE * i for name, i in self._timeframe.items()}
        self._rows: dict[str, int] = {}
        self._generation = -1
        self._views: tuple[Times, Values] | None = None

    # -- opening and closing

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        symbols_capacity: int,
        candles: int,
        timeframes: tuple[str, ...] = TIMEFRAMES,
        doubt: str = "",
    ) -> "CandleStore":
        """Create the file or reopen it for writing, with room for at least `symbols_capacity` symbols.

        A damaged file or one of another layout is renamed to `<name>.bad-N` (the newest three are kept)
        and an empty one takes its place. Rows that a killed daemon was writing are emptied, all rows
        are when the machine went down with the file open.
        Args: doubt: why a file that is there is not to be believed, or "".
        Raises: DataDirectoryUnusable: the file cannot be written, or the disk has no room for it.
        """
        wanted = Layout(symbols_capacity, candles, _slots(candles), tuple(timeframes))
        try:
            if path.exists():
                try:
                    if doubt:
                        raise CandleFileInvalid(doubt)
                    return cls._reopen(path, wanted)
                except CandleFileInvalid as error:
                    aside = _set_aside(path)
                    _log("candle file set aside", reason=str(error), renamed_to=aside.name)
            _create(path, wanted)
            return cls._reopen(path, wanted)
        except OSError as error:
            raise DataDirectoryUnusable(f"{path}: {error.strerror or error}") from error

    @classmethod
    def attach(cls, path: Path) -> "CandleStore":
        """Read a store that another process writes. Raises CandleFileInvalid."""
        try:
            with path.open("rb") as file:
                layout = _read_layout(file.fileno())
                memory = mmap.mmap(file.fileno(), layout.file_bytes, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CandleFileInvalid(f"{path}: {error.strerror or error}") from error
        return cls(path, memory, layout, writable=False)

    @classmethod
    def _reopen(cls, path: Path, wanted: Layout) -> "CandleStore":
        with path.open("r+b") as file:
            layout = _read_layout(file.fileno())
            if layout._replace(capacity=wanted.capacity) != wanted or layout.capacity < wanted.capacity:
                raise CandleFileInvalid(f"it holds {_describe(layout)}, wanted are {_describe(wanted)}")
            _allocate(file.fileno(), layout.file_bytes)
            memory = mmap.mmap(file.fileno(), layout.file_bytes)
        store = cls(path, memory, layout, writable=True)
        store._recover()
        return store

    def close(self) -> None:
        """Put everything on disk (when writing) and let go of the file. Views handed out stay valid."""
        if self._writable:
            self._map.flush()
            self._q[_CLEAN_WORD] = 1
            self._map.flush(0, _HEADER_BYTES)
        self._writable = False
        self._views = None
        for view in (self._q, self._d, self._bytes):
            view.release()
        try:
            self._map.close()
        except BufferError:  # somebody still holds a window: the mapping goes with the last of them
            return

    @property
    def bytes(self) -> int:
        """Size of the file; resident are only the rows in use."""
        return self._layout.file_bytes

    @property
    def candles(self) -> int:
        """How many closed candles a series keeps."""
        return self._layout.candles

    @property
    def header(self) -> Header:
        return _header(self._layout, self._bytes[:_HEADER_BYTES])

    @property
    def capacity(self) -> int:
        return self._layout.capacity

    @property
    def timeframes(self) -> tuple[str, ...]:
        return self._layout.timeframes

    # -- symbols

    def row_of(self, symbol: str) -> int | None:
        rows = self._rows if self._q[_GENERATION_WORD] == self._generation else self._table()
        return rows.get(symbol)

    def symbol_of(self, row: int) -> str | None:
        """The symbol that owns the row now; None when the row is free or its entry is damaged."""
        at = _HEADER_BYTES + row * _SYMBOL_BYTES
        length = self._bytes[at]
        if not 0 < length <= _NAME_BYTES:
            return None
        name = bytes(self._bytes[at + 1 : at + 1 + length])
        if self._read_crc(at) != zlib.crc32(name):
            return None
        return name.decode("utf-8", "replace")

    def symbols(self) -> list[tuple[int, str]]:
        """Every (row, symbol), by row."""
        return sorted((row, symbol) for symbol, row in self._table().items())

    def add_symbol(self, symbol: str) -> int:
        """The symbol's row; a free row is given to a new symbol. Raises CandleStoreFull."""
        known = self._table().get(symbol)
        if known is not None:
            return known
        name = symbol.encode()
        if not 0 < len(name) <= _NAME_BYTES:
            raise ValueError(f"a symbol has 1 to {_NAME_BYTES} bytes of UTF-8, {symbol!r} has {len(name)}")
        taken = set(self._rows.values())
        row = next((r for r in range(self.capacity) if r not in taken), None)
        if row is None:
            raise CandleStoreFull(f"no row is left for {symbol}: all {self.capacity} are taken")
        self._write_name(row, name)
        self._rows[symbol] = row
        self._generation = self._q[_GENERATION_WORD]  # the writer knows its own change
        return row

    def remove_symbol(self, symbol: str) -> None:
        """Empty the symbol's row and free it; a symbol that is not there is no error."""
        row = self._table().get(symbol)
        if row is not None:
            self._write_name(row, b"")

    def _table(self) -> dict[str, int]:
        generation = self._q[_GENERATION_WORD]
        if generation != self._generation:
            names = ((self.symbol_of(row), row) for row in range(self.capacity))
            self._rows = {symbol: row for symbol, row in names if symbol is not None}
            self._generation = generation
        return self._rows

    def _write_name(self, row: int, name: RawBytes) -> None:
        at = _HEADER_BYTES + row * _SYMBOL_BYTES
        state = self._state(row)
        self._q[state] += 1
        self._bytes[at : at + _SYMBOL_BYTES] = bytes(_SYMBOL_BYTES)
        self._empty(row)
        if name:
            self._bytes[at + 1 : at + 1 + len(name)] = name
            _CRC.pack_into(self._bytes, at + _SYMBOL_BYTES - _CRC.size, zlib.crc32(name))
            self._bytes[at] = len(name)  # last: until then the row is free
        self._q[state] += 1
        self._q[_GENERATION_WORD] += 1

    def _read_crc(self, at: int) -> int:
        crc: int = _CRC.unpack_from(self._bytes, at + _SYMBOL_BYTES - _CRC.size)[0]
        return crc

    # -- writing candles

    def append(self, row: int, timeframe: str, rows: Sequence[CandleRow]) -> int:
        """Append closed candles, oldest first; returns how many were new.

        A candle that is there already is skipped; one whose values differ from what is there replaces it
        and is counted in `corrected` (the venue corrected it); one older than the series is ignored.
        Raises: GapFound: a candle leaves out one or more of the grid, the earlier ones were appended.
        ValueError: a candle is malformed (`candle_problem`), nothing was written.
        """
        index = self._timeframe[timeframe]
        step = self._steps[index]
        for candle in rows:
            if problem := candle_problem(candle, step):
                raise ValueError(f"candle {candle}: {problem}")
        state = self._state(row)
        self._q[state] += 1
        try:
            return self._append(row, index, step, rows)
        finally:
            self._q[state] += 1

    def replace(self, row: int, timeframe: str, rows: Sequence[CandleRow]) -> int:
        """Forget the series and start it again with these; returns how many it has. Raises as `append`."""
        state = self._state(row)
        end_at = state + 1 + _STATE * self._timeframe[timeframe]
        self._q[state] += 1
        self._q[end_at] = self._q[end_at + 1] = 0
        self._q[end_at + 2] += 1
        self._q[state] += 1
        return self.append(row, timeframe, rows)

    def clear(self, row: int) -> None:
        """Forget every candle of the row."""
        state = self._state(row)
        self._q[state] += 1
        self._empty(row)
        self._q[state] += 1

    def _append(self, row: int, index: int, step: int, rows: Sequence[CandleRow]) -> int:
        q, d = self._q, self._d
        slots, candles = self._layout.slots, self._layout.candles
        end_at = self._state(row) + 1 + _STATE * index
        base = self._series(row, index)
        end, count = q[end_at], q[end_at + 1]
        last = q[base + end - 1] if count else 0
        appended = 0
        for candle in rows:
            open_ms = candle[0]
            if count and open_ms <= last:
                if self._correct(base, end, count, (last - open_ms) // step, candle):
                    q[end_at + 2] += 1
                continue
            if count and open_ms != last + step:
                raise GapFound(expected_ms=last + step, found_ms=open_ms, appended=appended)
            if end == slots:
                end = self._slide(base, end, min(count, candles - 1))
            q[base + end] = open_ms
            at = base + end
            for value in islice(candle, 1, None):
                at += slots
                d[at] = value
            end += 1
            count = min(count + 1, candles)
            last = open_ms
            appended += 1
            q[end_at] = end
            q[end_at + 1] = count
            q[end_at + 2] += 1
        return appended

    def _correct(self, base: int, end: int, count: int, age: int, candle: CandleRow) -> bool:
        """Whether the candle of this age was there with other values."""
        if age >= count:
            return False
        at = base + end - 1 - age
        slots = self._layout.slots
        if all(self._d[at + slots * i] == candle[i] for i in range(1, _SERIES)):
            return False
        for i in range(1, _SERIES):
            self._d[at + slots * i] = candle[i]
        self.corrected += 1
        return True

    def _slide(self, base: int, end: int, keep: int) -> int:
        q, slots = self._q, self._layout.slots
        for first in range(base, base + _SERIES * slots, slots):
            q[first : first + keep] = q[first + end - keep : first + end]
        return keep

    def _empty(self, row: int) -> None:
        state = self._state(row)
        for end_at in range(state + 1, state + self._layout.state_words, _STATE):
            self._q[end_at] = self._q[end_at + 1] = 0
            self._q[end_at + 2] += 1
        forming = self._forming(row, 0)
        for at in range(forming, forming + _SERIES * len(self._steps), _SERIES):
            self._q[at] = 0

    # -- reading candles

    def window(self, row: int, timeframe: str, count: int) -> "tuple[Times, Fields]":
        """The newest `count` closed candles, or as many as there are: int64[n] open times and `Fields`.

        Views on the file, contiguous and read-only, oldest first: no copy, so a later append may change
        them; see `sequence`.
        """
        open_ms, *fields = self.columns(row, timeframe, count)
        return open_ms, Fields(*fields)

    def columns(
        self, row: int, timeframe: str, count: int
    ) -> "tuple[Times, Values, Values, Values, Values, Values]":
        """As `window`, in one tuple: open time, open, high, low, close, volume."""
        index = self._timeframe[timeframe]
        state = self._state(row) + 1 + _STATE * index
        held = self._q[state + 1]
        if held > count:
            held = count
        times, values = self._views or self._numpy()
        slots = self._slots
        to = row * self._row_words + index * self._series_words + self._q[state]
        at = to - held
        open_ms = times[at:to]
        # written out: a loop over five views takes twice as long, and this runs for every series
        open_ = values[(at := at + slots) : (to := to + slots)]
        high = values[(at := at + slots) : (to := to + slots)]
        low = values[(at := at + slots) : (to := to + slots)]
        close = values[(at := at + slots) : (to := to + slots)]
        volume = values[at + slots : to + slots]
        return open_ms, open_, high, low, close, volume

    def last_open_ms(self, row: int, timeframe: str, state: Sequence[int] | None = None) -> int:
        """Open time of the newest closed candle; 0 when there is none.

        Args: state: the row's, when it is at hand.
        """
        if state is None:
            state = self.state(row)
        count_at = self.count_at[timeframe]
        if not state[count_at]:
            return 0
        return self._q[self._series(row, self._timeframe[timeframe]) + state[count_at - 1] - 1]

    def first_open_ms(self, row: int, timeframe: str) -> int:
        """Open time of the oldest closed candle; 0 when there is none."""
        index = self._timeframe[timeframe]
        state = self._state(row) + 1 + _STATE * index
        end, count = self._q[state], self._q[state + 1]
        return self._q[self._series(row, index) + end - count] if count else 0

    def count(self, row: int, timeframe: str) -> int:
        return self._q[self._state(row) + self.count_at[timeframe]]

    def rows_since(self, row: int, timeframe: str, since_ms: int, limit: int = 0) -> list[CandleRow]:
        """Closed candles that open at `since_ms` or later, oldest first; at most `limit` when it is set.

        Copies as plain Python values, for callers that have no numpy.
        """
        index = self._timeframe[timeframe]
        state = self._state(row) + 1 + _STATE * index
        end, count = self._q[state], self._q[state + 1]
        if not count:
            return []
        base, slots = self._series(row, index), self._layout.slots
        first = self._q[base + end - count]
        skipped = max(0, -(-(since_ms - first) // self._steps[index]))
        start = end - count + min(skipped, count)
        stop = min(end, start + limit) if limit else end
        columns = [
            self._d[base + i * slots + start : base + i * slots + stop].tolist() for i in range(1, _SERIES)
        ]
        return list(zip(self._q[base + start : base + stop].tolist(), *columns, strict=True))

    def sequence(self, row: int) -> int:
        """Even: the row is stable. Odd: it is being written. It grows with each change of the row."""
        return self._q[self._state(row)]

    def version(self, row: int, timeframe: str) -> int:
        """It grows with each change of the series' closed candles, as `sequence` does with those of the row.

        Read it while the sequence is even, and use what it vouches for only when the sequence stays.
        """
        return self._q[self._state(row) + self.version_at[timeframe]]

    def state(self, row: int) -> tuple[int, ...]:
        """What `sequence`, `count` and `version` say, read at once and the sequence first.

        The sequence is at 0, the others at `count_at` and `version_at` of a timeframe.
        """
        return self._read_state(self._bytes, self._state(row) * 8)

    def content(self, row: int) -> RawBytes:
        """A copy of all closed candles of the row as raw bytes, to tell two states of it apart.

        It is whole only when the sequence is even and the same before and after.
        """
        pieces = []
        slots = self._layout.slots
        for index in range(len(self._steps)):
            state = self._state(row) + 1 + _STATE * index
            base, end, count = self._series(row, index), self._q[state], self._q[state + 1]
            for first in range(base + end - count, base + end - count + _SERIES * slots, slots):
                pieces.append(self._bytes[first * 8 : (first + count) * 8])
        return b"".join(pieces)

    # -- the forming candle

    def set_forming(self, row: int, timeframe: str, candle: CandleRow) -> None:
        """Keep the candle that has not closed yet; it is never part of a window nor of the sequence."""
        at = self._forming(row, self._timeframe[timeframe])
        self._q[at] = candle[0]
        for i in range(1, _SERIES):
            self._d[at + i] = candle[i]

    def forming(self, row: int, timeframe: str) -> CandleRow | None:
        """The forming candle as last reported, or None."""
        at = self._forming(row, self._timeframe[timeframe])
        open_ms = self._q[at]
        if not open_ms:
            return None
        open_, high, low, close, volume = self._d[at + 1 : at + _SERIES].tolist()
        return open_ms, open_, high, low, close, volume

    # -- places, in words of eight bytes

    def _state(self, row: int) -> int:
        if not 0 <= row < self._layout.capacity:
            raise IndexError(f"row {row} of {self._layout.capacity}")
        return self._state_at + row * self._state_words

    def _forming(self, row: int, index: int) -> int:
        return self._layout.forming_at // 8 + (row * len(self._steps) + index) * _SERIES

    def _series(self, row: int, index: int) -> int:
        return self._series_at + row * self._row_words + index * self._series_words

    def _numpy(self) -> "tuple[Times, Values]":
        if self._views is None:
            import numpy as np  # 15 MB that the writing daemon never pays

            values = np.frombuffer(self._map, dtype=np.float64, offset=self._layout.series_at)
            values.flags.writeable = False
            times = values.view(np.int64)
            times.flags.writeable = False
            self._views = (times, values)
        return self._views

    # -- after a crash

    def _recover(self) -> None:
        """Empty what cannot be trusted, and mark the file as in use.

        Pages outlive a killed process, not a fallen machine: without an orderly close in this boot or
        an earlier one, any page may be older than its neighbours, so all candles are fetched again.
        """
        boot = boot_id().encode()
        written_in = bytes(self._bytes[_BOOT_AT : _BOOT_AT + _BOOT_BYTES]).rstrip(b"\0")
        trusted = bool(self._q[_CLEAN_WORD]) or (boot != b"" and written_in == boot)
        seen: set[str] = set()
        for row in range(self.capacity):
            self._recover_row(row, seen, trusted=trusted)
        self._bytes[_BOOT_AT : _BOOT_AT + _BOOT_BYTES] = boot.ljust(_BOOT_BYTES, b"\0")
        if not self._bytes[_MARK_AT]:  # new, or made before files had one
            self._bytes[_MARK_AT : _MARK_AT + _MARK_BYTES] = os.urandom(_MARK_BYTES // 2).hex().encode()
        self._q[_CLEAN_WORD] = 0
        self._q[_GENERATION_WORD] += 1

    def _recover_row(self, row: int, seen: set[str], *, trusted: bool) -> None:
        state = self._state(row)
        symbol = self.symbol_of(row)
        torn = bool(self._q[state] & 1)
        if torn:
            self._q[state] += 1
        if symbol is None or symbol in seen:
            if torn or self._bytes[_HEADER_BYTES + row * _SYMBOL_BYTES]:
                self._write_name(row, b"")
            return
        seen.add(symbol)
        if torn or not trusted or not all(map(self._sound, self._series_of(row))):
            self.clear(row)
            _log("candles of a symbol dropped", symbol=symbol, torn=torn, orderly_close=trusted)

    def _series_of(self, row: int) -> Iterator[tuple[int, int, int, int]]:
        for index, step in enumerate(self._steps):
            state = self._state(row) + 1 + _STATE * index
            yield self._series(row, index), self._q[state], self._q[state + 1], step

    def _sound(self, series: tuple[int, int, int, int]) -> bool:
        """Whether a series is within its bounds, on its grid without holes, positive and finite."""
        base, end, count, step = series
        slots = self._layout.slots
        if not (0 <= count <= min(end, self._layout.candles) and end <= slots):
            return False
        if not count:
            return True
        start = base + end - count
        times = self._q[start : start + count].tolist()
        if times[0] <= 0 or times[0] % step or times != list(range(times[0], times[0] + count * step, step)):
            return False
        lows = self._d[start + 3 * slots : start + 3 * slots + count]
        total = sum(sum(self._d[start + i * slots : start + i * slots + count]) for i in range(1, _SERIES))
        return min(lows) > 0.0 and math.isfinite(total)


def _slots(candles: int) -> int:
    slots = candles + max(candles // 32, 8)
    return -(-slots // 8) * 8  # whole cache lines


def _describe(layout: Layout) -> str:
    series = f"{layout.candles} candles in {layout.slots} slots"
    return f"{layout.capacity} symbols x {'/'.join(layout.timeframes)} x {series}"


def _read_layout(descriptor: int) -> Layout:
    layout = Layout.decode(os.pread(descriptor, _HEADER_BYTES, 0))
    size = os.fstat(descriptor).st_size
    if size != layout.file_bytes:
        raise CandleFileInvalid(f"it has {size} bytes instead of {layout.file_bytes}")
    return layout


def _create(path: Path, layout: Layout) -> None:
    new = path.with_name(path.name + ".new")
    with new.open("w+b") as file:
        _allocate(file.fileno(), layout.file_bytes)
        os.pwrite(file.fileno(), layout.encode(), 0)
        os.fsync(file.fileno())
    new.replace(path)


def _allocate(descriptor: int, size: int) -> None:
    """Claim the disk's blocks now: a write to a page the disk has no room for kills the process."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except (AttributeError, OSError) as error:  # no such call on this system or file system
        if isinstance(error, OSError) and error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(descriptor, size)


def _set_aside(path: Path) -> Path:
    pattern = re.compile(re.escape(path.name) + r"\.bad-(\d+)")
    aside = {int(m[1]): p for p in path.parent.iterdir() if (m := pattern.fullmatch(p.name))}
    number = max(aside, default=0) + 1
    for old, old_path in aside.items():
        if old <= number - _KEPT_ASIDE:
            old_path.unlink()
    target = path.with_name(f"{path.name}.bad-{number}")
    path.rename(target)
    return target


def boot_id() -> str:
    """Of this boot of this machine; "" where the system has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()[:_BOOT_BYTES]
    except (OSError, UnicodeDecodeError):
        return ""


def _log(event: str, **fields: object) -> None:
    import structlog  # 9 MB that a worker, which only reads, never pays

    structlog.get_logger("market.candles").warning(event, **fields)
