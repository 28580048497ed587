"""Records on their way to the archive.

They wait here, so that a full disk never holds up a stop. Entries are off while the archive cannot be
written: what gathers is what ends the positions that are open.

The store keeps each fill, adjustment, state of an order and closed position until it is told that the archive
has it: what a crash took from the queue is put at the next start. A crash between the archive and the store
puts some again, equal to the first; of a position told again, the newest counts. Of a position that opens or
moves its stop, the states in the queue may be lost; the store has the last.
"""

import asyncio
import contextlib

import structlog

from service.errors import DataDirectoryUnusable, LeaseLost
from service.ports import Archive, Recorder, StateStore
from service.records import Order, OrderStatus, Record

log = structlog.get_logger("trading.outbox")

OUTBOX_RECORDS = 10_000
OUTBOX_LIMIT_S = 2.0
AT_ONCE = 50  # in one transaction
BACKLOG_SHARE = 4  # one in so many of those the store was not told yet, where that is more
STREAMS = ("orders", "fills", "adjustments", "positions")

LATEST_MS = 1 << 62
STATUSES = tuple(OrderStatus)

Item = tuple[str, Record]


def _in_time(item: Item) -> tuple[int, bool, int]:
    """States of orders, oldest first and their ends last; they come before everything else."""
    _, record = item
    if isinstance(record, Order):
        return record.updated_ms, record.status.final, STATUSES.index(record.status)
    return LATEST_MS, True, 0


class Outbox:
    """A bounded queue; what does not fit is counted, logged, and archived at the next start at best."""

    def __init__(self, archive: Archive, recorder: Recorder, store: StateStore) -> None:
        self._archive = archive
        self._recorder = recorder
        self._store = store
        self._queue: asyncio.Queue[tuple[Item, bool]] = asyncio.Queue(OUTBOX_RECORDS)
        self._unmarked: list[Item] = []  # in the archive, and the store was not told yet
        self._unmarked_more = asyncio.Event()
        self._marked = asyncio.Event()  # the store was told, or could not be
        self._marked.set()
        self._restored = False

    @property
    def depth(self) -> int:
        return self._queue.qsize()

    async def restore(self) -> None:
        """Take what the last run did not hand over; once, before anything is booked."""
        if self._restored:
            return
        left = [(stream, record) for stream in STREAMS for record in await self._store.unarchived(stream)]
        self._restored = True
        for stream, record in sorted(left, key=_in_time):  # stable: all else in the order of the streams
            self.put(stream, record)
        if left:
            log.info("records that the archive has not got yet go there now", records=len(left))

    def put(self, stream: str, record: Record) -> None:
        """Take one record; never blocks."""
        try:
            self._queue.put_nowait(((stream, record), True))
        except asyncio.QueueFull:
            self._discarded(stream, record, "too many wait for the disk")

    def kept_late(self, stream: str, record: Record) -> None:
        """The store took a record after it was put here: it is told again, and nothing is archived twice."""
        with contextlib.suppress(asyncio.QueueFull):  # then the next start archives it again
            self._queue.put_nowait(((stream, record), False))

    async def written(self) -> None:
        """Returns once the archive has every record taken so far."""
        await self._queue.join()

    async def close(self) -> None:
        """Hand over the last records, within a limit: a full disk must not hold up the end."""
        try:
            async with asyncio.timeout(OUTBOX_LIMIT_S):
                await self.written()
                if self._unmarked:  # what the store did not take before, it may take now
                    self._marked.clear()
                    self._unmarked_more.set()
                await self._marked.wait()
        except TimeoutError:
            log.error("records did not reach the archive", records=self.depth, unmarked=len(self._unmarked))

    async def run(self) -> None:
        """Hand records to the archive until cancelled; what the store takes to hear of it holds none up."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._mark(), name="trading.records.mark")
            while True:
                batch = [await self._queue.get()]
                while len(batch) < AT_ONCE and not self._queue.empty():
                    batch.append(self._queue.get_nowait())
                try:
                    await self._hand_over(batch)
                finally:
                    for _ in batch:
                        self._queue.task_done()

    async def _hand_over(self, batch: list[tuple[Item, bool]]) -> None:
        for (stream, record), new in batch:
            if not new:
                continue
            try:
                await self._archive.put(stream, record)
            except ValueError as error:  # a record that no archive takes must not hold up the others
                self._discarded(stream, record, str(error))
        self._unmarked += [item for item, _ in batch]
        self._marked.clear()
        self._unmarked_more.set()

    async def _mark(self) -> None:
        """Tell the store what the archive has, until cancelled; what it does not take goes with the next."""
        while True:
            await self._unmarked_more.wait()
            self._unmarked_more.clear()
            while self._unmarked:
                # The store puts this off while it is busy: what then gathers must not do so without end.
                most = max(AT_ONCE, len(self._unmarked) // BACKLOG_SHARE)
                done, self._unmarked = self._unmarked[:most], self._unmarked[most:]
                try:
                    await self._store.archived(done)
                except (DataDirectoryUnusable, LeaseLost) as error:
                    # those beyond are put again at the next start
                    self._unmarked = [*done, *self._unmarked][-OUTBOX_RECORDS:]
                    log.debug(
                        "the store does not know yet what is archived",
                        records=len(self._unmarked),
                        reason=str(error),
                    )
                    break
            if not self._unmarked_more.is_set():
                self._marked.set()

    def _discarded(self, stream: str, record: Record, reason: str) -> None:
        self._recorder.count("trading.records_discarded")
        log.error(
            "a record could not be kept for the archive",
            stream=stream,
            reason=reason,
            record=str(record)[:500],
        )
