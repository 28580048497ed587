"""Records on their way to the archive.

They wait here, so that a full disk never holds up a stop. Entries are off while the archive cannot be
written: what gathers is what ends the positions that are open.
"""

import asyncio

import structlog

from service.ports import Archive, Recorder
from service.records import Record

log = structlog.get_logger("trading.outbox")

OUTBOX_RECORDS = 10_000
OUTBOX_LIMIT_S = 2.0


class Outbox:
    """A bounded queue; what does not fit is counted, logged and lost to the archive."""

    def __init__(self, archive: Archive, recorder: Recorder) -> None:
        self._archive = archive
        self._recorder = recorder
        self._queue: asyncio.Queue[tuple[str, Record]] = asyncio.Queue(OUTBOX_RECORDS)

    @property
    def depth(self) -> int:
        return self._queue.qsize()

    def put(self, stream: str, record: Record) -> None:
        """Take one record; never blocks."""
        try:
            self._queue.put_nowait((stream, record))
        except asyncio.QueueFull:
            self._discarded(stream, record, "too many wait for the disk")

    async def written(self) -> None:
        """Returns once the archive has every record taken so far."""
        await self._queue.join()

    async def close(self) -> None:
        """Hand over the last records, within a limit: a full disk must not hold up the end."""
        try:
            async with asyncio.timeout(OUTBOX_LIMIT_S):
                await self.written()
        except TimeoutError:
            log.error("records did not reach the archive", records=self.depth)

    async def run(self) -> None:
        """Hand records to the archive until cancelled."""
        while True:
            stream, record = await self._queue.get()
            try:
                await self._archive.put(stream, record)
            except ValueError as error:  # a record that no archive takes must not hold up the others
                self._discarded(stream, record, str(error))
            finally:
                self._queue.task_done()

    def _discarded(self, stream: str, record: Record, reason: str) -> None:
        self._recorder.count("trading.records_discarded")
        log.error(
            "a record could not be kept for the archive",
            stream=stream,
            reason=reason,
            record=str(record)[:500],
        )
