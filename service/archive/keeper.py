"""Keeps the archive small while the daemon runs: starts `upkeep` at quiet times and knows the disk's use.

Upkeep is a process of its own, niced, with its own memory limit; it is ended when memory becomes scarce,
which is safe at any moment.
"""

import asyncio
import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import structlog

from service.archive.schema import STREAMS
from service.archive.segments import hot_segments
from service.archive.upkeep import Outcome, Task
from service.ports import Recorder
from service.settings import ArchiveSettings

log = structlog.get_logger("archive.keeper")

_POLL_S = 1.0
_END_LIMIT_S = 5.0


class Keeper:
    """Looks every `compact_every_s` whether there is something to do. Run `run` as a task.

    Args: calm: whether there is memory and CPU to spare for a process of `compact_memory_mb`; asked again
    every second while one runs.
    """

    def __init__(
        self, directory: Path, settings: ArchiveSettings, recorder: Recorder, *, calm: Callable[[bool], bool]
    ) -> None:
        self._directory = directory
        self._settings = settings
        self._recorder = recorder
        self._calm = calm
        self.disk_bytes = 0
        self.disk_free_bytes = 0
        self.runs = 0
        self.looks = 0

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                await self._once()
            except OSError as error:  # a disk or a kernel without room: looked at again later
                self._recorder.count("archive.upkeep_failures")
                log.warning("upkeep of the archive was not possible", reason=str(error))
            self.looks += 1
            await asyncio.sleep(self._settings.compact_every_s)

    async def _once(self) -> None:
        sealed = await asyncio.to_thread(self._look)
        if self._settings.compact and (sealed or self._retains()) and self._calm(False):
            await self._upkeep()
            await asyncio.to_thread(self._look)

    def _retains(self) -> bool:
        return bool(self._settings.keep_days or self._settings.keep_mb)

    def _look(self) -> int:
        """Measure the disk; how many segments are finished and not compacted."""
        with contextlib.suppress(OSError):  # a file that goes while we look
            self.disk_bytes = sum(
                file.stat().st_size for file in self._directory.rglob("*") if file.is_file()
            )
            space = os.statvfs(self._directory)
            self.disk_free_bytes = space.f_bavail * space.f_frsize
        return sum(max(len(hot_segments(self._directory, stream)) - 1, 0) for stream in STREAMS)

    async def _upkeep(self) -> None:
        settings = self._settings
        task = Task(str(self._directory), settings.compact_memory_mb, settings.keep_days, settings.keep_mb)
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "service.archive.upkeep",
            msgspec.json.encode(task).decode(),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        self.runs += 1
        asking = asyncio.create_task(process.communicate(), name="archive.upkeep")
        try:
            while not asking.done():
                await asyncio.wait({asking}, timeout=_POLL_S)
                if not asking.done() and not self._calm(True):
                    log.info("upkeep of the archive gives way, memory is scarce")
                    process.terminate()
                    await asyncio.wait({asking}, timeout=_END_LIMIT_S)
                    break
        finally:
            if not asking.done():
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
            output, errors = await asking
        self._report(process.returncode, output, errors)

    def _report(self, code: int | None, output: bytes, errors: bytes) -> None:
        lines = output.splitlines()
        if code == 0 and lines:
            outcome = msgspec.json.decode(lines[-1], type=Outcome)
            self._recorder.count("archive.compacted_segments", outcome.segments)
            self._recorder.count("archive.refused_segments", outcome.refused)
            if outcome.segments or outcome.refused or outcome.pruned_bytes:
                log.info("archive compacted", **msgspec.structs.asdict(outcome))
            reasons = lines[:-1]
        else:
            reasons = [*lines, *errors.splitlines()][-3:]
            self._recorder.count("archive.upkeep_failures")
            log.warning("upkeep of the archive did not finish, it is tried again", code=code)
        for reason in reasons:
            log.warning("upkeep of the archive", reason=reason.decode(errors="replace")[:500])
