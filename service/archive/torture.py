"""`perpd archive torture`: kill a process that records under load, over and over; count what is missing.

Each round is a fresh process. It reports every record it is about to put, and every one whose `put`
returned, through a pipe that outlives it. After SIGKILL at a random moment the archive is opened again, which
replays the journal, and what is new in the segments is compared: lost is acknowledged and absent, duplicated
is there more often than it was put. Sequence numbers must go on without a gap. A daemon compacts meanwhile,
and its upkeep outlives it: records are counted in lines and Parquet together. At the end the archive is
verified, that of the daemon once it is all compacted.
"""

import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from decimal import ROUND_HALF_UP, Context, Decimal, InvalidOperation
from hashlib import blake2b
from pathlib import Path
from typing import Any

import msgspec

from service.archive.archiver import archiving
from service.archive.lock import only_upkeep
from service.archive.segments import Envelope, first_sequence, hot_and_compacted, parquet_range
from service.clock import WallClock
from service.errors import EXIT_FAILURE, EXIT_OK, DataDirectoryUnusable, PerpdError
from service.settings import ArchiveSettings

DIGEST_BYTES = 8
ABOUT_TO_PUT, ACKNOWLEDGED, READY = b"P", b"A", b"R"
MESSAGE_BYTES = 1 + DIGEST_BYTES
START_LIMIT_S = 120.0
LONGEST_LOAD_S = {"archive": 0.15, "daemon": 2.0}
START_KILL_FRACTION = 0.1  # of the kills come while it starts: a replay must survive a kill too
SIM_SYMBOLS, SIM_SPEED = 40, 600
UPKEEP_LIMIT_S = 120.0
UPKEEP_MEMORY_MB = 128
_ENVELOPE = frozenset(Envelope.__struct_fields__)
_PLACES = Decimal(1).scaleb(-18)
_EXACT = Context(prec=60)


class TortureFailed(PerpdError):
    """The archive lost, repeated or misplaced a record, or the process under test did not start."""


class Found(msgspec.Struct, frozen=True):
    """What the rounds came to."""

    kills: int
    acknowledged: int
    kept: int
    compacted: int  # of those kept, read from Parquet
    unacknowledged: int  # kept although the kill came before put returned
    replayed: int
    torn_bytes: int
    lost: int
    duplicated: int
    misnumbered: int
    faults: int  # what `perpd archive verify` finds, and records that it counts too many or too few
    seconds: float


def digest(record: bytes) -> bytes:
    """The same for a record however it is written: as it was put, as a line, or from a row of Parquet."""
    return digest_of(msgspec.json.decode(record))


def digest_of(fields: dict[str, Any]) -> bytes:
    plain = msgspec.json.encode(_plain(fields), order="deterministic")
    return blake2b(plain, digest_size=DIGEST_BYTES).digest()


def _plain(value: Any) -> Any:
    """Amounts as in a DECIMAL(38,18), numbers as floats, without what is null."""
    if isinstance(value, dict):
        if set(value) == {"key", "value"} and isinstance(
            value["key"], list
        ):  # a MAP, as some DuckDBs give it
            value = dict(zip(value["key"], value["value"], strict=True))
        return {str(name): _plain(inner) for name, inner in value.items() if inner is not None}
    if isinstance(value, str | Decimal):
        try:
            return str(Decimal(value).quantize(_PLACES, ROUND_HALF_UP, _EXACT))
        except InvalidOperation:  # no amount
            return str(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    return value


def torture(kind: str, kills: int, seed: int, directory: Path, *, tell: bool = False) -> Found:
    """Kill a process `kills` times and account for every record.

    Args: kind: "archive" (producers alone) or "daemon" (`perpd run` on a simulated exchange).
    Raises: TortureFailed: the process under test does not start.
    """
    chance = random.Random(seed)
    ledger = _Ledger(directory / "archive")
    began_s = time.monotonic()
    with _load(kind, directory) as command:
        for number in range(kills):
            _round(kind, command, ledger, chance)
            if chance.random() < 0.5 or number == kills - 1:
                ledger.settle()
            if tell and (number + 1) % max(kills // 10, 1) == 0:
                print(f"{number + 1} kills: {ledger.words}", file=sys.stderr, flush=True)  # noqa: T201
    ledger.verify(compacted=kind == "daemon")  # producers put one kind of record into every stream
    return ledger.found(kills, time.monotonic() - began_s)


def run(kind: str, kills: int, seed: int, directory: Path | None) -> int:
    """The command: prints what was found; exit code 1 when anything was lost, repeated or misplaced."""
    with tempfile.TemporaryDirectory(prefix="perpd-torture-", dir=directory) as place:
        found = torture(kind, kills, seed, Path(place), tell=True)
    print(  # noqa: T201
        f"{found.kills} kills of the {kind} in {found.seconds:.0f} s, seed {seed}: "
        f"{found.acknowledged} records acknowledged, {found.kept} kept "
        f"({found.unacknowledged} of them unacknowledged, {found.compacted} already in Parquet), "
        f"{found.replayed} replayed from the journal, "
        f"{found.torn_bytes} torn bytes set aside\n"
        f"lost {found.lost}, duplicated {found.duplicated}, misnumbered {found.misnumbered}, "
        f"faults {found.faults}"
    )
    faults = (found.lost, found.duplicated, found.misnumbered, found.faults)
    return EXIT_FAILURE if any(faults) else EXIT_OK


@contextmanager
def _load(kind: str, directory: Path) -> Iterator[dict[str, Any]]:
    """What the process under test is told; for a daemon, with an exchange that outlives it."""
    if kind == "archive":
        yield {"kind": kind, "directory": str(directory / "archive")}
        return
    arguments = ["--symbols", str(SIM_SYMBOLS), "--speed", str(SIM_SPEED), "--parent"]
    exchange = subprocess.Popen(
        [sys.executable, "-m", "service", "sim", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert exchange.stdout is not None
        url = json.loads(exchange.stdout.readline())["rest_url"]
        threading.Thread(target=exchange.stdout.read, daemon=True).start()
        argv = ["run", "--data-dir", str(directory), "--symbols", str(SIM_SYMBOLS)]
        yield {"kind": kind, "argv": argv, "url": url}
    finally:
        exchange.kill()
        exchange.communicate()


def _round(kind: str, command: dict[str, Any], ledger: "_Ledger", chance: random.Random) -> None:
    reading, writing = os.pipe()
    spec = {**command, "pipe": writing, "seed": chance.randrange(2**31)}
    process = subprocess.Popen(
        [sys.executable, "-m", "service.archive.torture_child", json.dumps(spec)],
        pass_fds=(writing,),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    os.close(writing)
    listener = _Listener(reading, ledger)
    try:
        if chance.random() < START_KILL_FRACTION:
            time.sleep(chance.uniform(0.0, 0.4))
        elif not listener.ready.wait(START_LIMIT_S):
            raise TortureFailed(f"the {kind} did not start within {START_LIMIT_S:.0f} s")
        else:
            time.sleep(chance.uniform(0.0, LONGEST_LOAD_S[kind]))
        ended = process.poll()
    finally:
        process.kill()
        _, errors = process.communicate()
        listener.finish()
    if ended is not None:
        words = errors.decode(errors="replace")[-600:]
        raise TortureFailed(f"the {kind} ended by itself with code {ended}: {words}")


class _Listener:
    """Reads what the process under test reports, until it was killed and the pipe is empty."""

    def __init__(self, pipe: int, ledger: "_Ledger") -> None:
        self._pipe = pipe
        self._ledger = ledger
        self._end = threading.Event()
        self.ready = threading.Event()
        os.set_blocking(pipe, False)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def finish(self) -> None:
        self._end.set()
        self._thread.join()
        os.close(self._pipe)

    def _listen(self) -> None:
        rest = b""
        while True:
            last = self._end.is_set()
            try:
                data = os.read(self._pipe, 1 << 20)
            except BlockingIOError:
                data = b""
            if data:
                rest = self._take(rest + data)
            elif last:
                return
            else:
                time.sleep(0.001)

    def _take(self, data: bytes) -> bytes:
        whole = len(data) // MESSAGE_BYTES * MESSAGE_BYTES
        for at in range(0, whole, MESSAGE_BYTES):
            kind, name = data[at : at + 1], data[at + 1 : at + MESSAGE_BYTES]
            if kind == READY:
                self.ready.set()
            elif kind == ABOUT_TO_PUT:
                self._ledger.put[name] += 1
            else:
                self._ledger.acknowledged[name] += 1
        return data[whole:]


@contextmanager
def _after_upkeep(directory: Path) -> Iterator[None]:
    """Wait for the upkeep that a killed daemon left, and let no other begin in the block."""
    until_s = time.monotonic() + UPKEEP_LIMIT_S
    with ExitStack() as held:
        while True:
            try:
                held.enter_context(only_upkeep(directory))
                break
            except DataDirectoryUnusable:
                if time.monotonic() > until_s:
                    raise TortureFailed("the upkeep of a killed daemon does not end") from None
                time.sleep(0.05)
        yield


class _Ledger:
    """What was put and acknowledged, against what the segments hold."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.put: Counter[bytes] = Counter()
        self.acknowledged: Counter[bytes] = Counter()
        self._read_bytes: dict[Path, int] = {}
        self._sequences: Counter[str] = Counter()
        self._totals: Counter[str] = Counter()

    @property
    def words(self) -> str:
        return f"lost {self._totals['lost']}, duplicated {self._totals['duplicated']}"

    def settle(self) -> None:
        """Replay the journal, then compare everything since the last time."""
        with _after_upkeep(self._directory):
            asyncio.run(self._replay())
            kept = Counter(self._new_records())
        for name, count in kept.items():
            self._totals["duplicated"] += max(0, count - self.put[name])
            self._totals["unacknowledged"] += max(0, count - self.acknowledged[name])
        for name, count in self.acknowledged.items():
            self._totals["lost"] += max(0, count - kept[name])
        self._totals["kept"] += kept.total()
        self._totals["acknowledged"] += self.acknowledged.total()
        self.put.clear()
        self.acknowledged.clear()

    def verify(self, *, compacted: bool) -> None:
        """Count again what is there, as `perpd archive verify` does."""
        from service.archive.compaction import compact
        from service.archive.verification import verify

        with _after_upkeep(self._directory):
            if compacted:
                self._totals["faults"] += compact(self._directory, newest=True).refused
            reports = verify(self._directory)
        self._totals["faults"] += sum(len(report.findings) for report in reports)
        self._totals["faults"] += abs(sum(report.records for report in reports) - self._totals["kept"])

    async def _replay(self) -> None:
        async with archiving(self._directory, ArchiveSettings(), WallClock(), drain_limit_s=60) as archive:
            statistics = archive.statistics()
        self._totals["replayed"] += statistics.replayed
        self._totals["torn_bytes"] += statistics.torn_bytes

    def _new_records(self) -> Iterator[bytes]:
        """The digest of each record that came since the last time, in the order of their numbers."""
        for stream in sorted(path.name for path in self._directory.iterdir() if path.is_dir()):
            hot, compacted = hot_and_compacted(self._directory, stream)
            firsts = {**{path: first_sequence(path) for path in hot}}
            firsts |= {path: parquet_range(path)[0] for path in compacted}
            for path in sorted(firsts, key=lambda path: firsts[path]):
                rows = self._lines(path) if path in hot else self._rows(path, stream)
                for fields in rows:
                    self._totals["misnumbered"] += fields["seq"] != self._sequences[stream] + 1
                    self._sequences[stream] = fields["seq"]
                    yield digest_of({name: fields[name] for name in fields if name not in _ENVELOPE})

    def _lines(self, path: Path) -> Iterator[dict[str, Any]]:
        with path.open("rb") as file:
            file.seek(self._read_bytes.get(path, 0))
            for line in file:
                yield msgspec.json.decode(line)
            self._read_bytes[path] = file.tell()

    def _rows(self, path: Path, stream: str) -> Iterator[dict[str, Any]]:
        """What was not read before the segment was compacted."""
        from service.archive.duck import connected, parquet_rows

        since = self._sequences[stream]
        if parquet_range(path)[1] <= since:
            return
        with connected(UPKEEP_MEMORY_MB) as connection:
            sql = f"SELECT * FROM ({parquet_rows(stream, [path])}) WHERE seq > {since} ORDER BY seq"
            found = connection.execute(sql)
            names = [column[0] for column in found.description or ()]
            rows = found.fetchall()
        self._totals["compacted"] += len(rows)
        yield from (dict(zip(names, row, strict=True)) for row in rows)

    def found(self, kills: int, seconds: float) -> Found:
        counted = {name: self._totals[name] for name in Found.__struct_fields__[1:-1]}
        return Found(kills=kills, seconds=seconds, **counted)
