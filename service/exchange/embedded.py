"""The embedded simulated exchange: a process apart, started and stopped with the daemon."""

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import structlog

from service.clock import ScaledClock
from service.errors import EXIT_SETTINGS, SettingsInvalid, VenueUnavailable
from service.settings import SimSettings

log = structlog.get_logger("exchange.embedded")

SIM_KEY = "sim-key"
SIM_SECRET = "sim-secret"  # opens the simulated exchange on loopback and nothing else
START_LIMIT_S = 90.0
STOP_LIMIT_S = 10.0
LINE_LIMIT_BYTES = 1 << 20


class SimulatedVenue(msgspec.Struct, frozen=True, kw_only=True):
    """Where a simulated exchange answers, and the clock of its market."""

    rest_url: str
    stream_url: str
    clock: ScaledClock
    end_ms: int  # the market stands still from then on; 0 when it has no end
    pid: int  # 0 when it is not ours


def clock_from(announcement: dict[str, Any]) -> ScaledClock:
    """The market's clock from the exchange's announcement; both processes share the monotonic clock."""
    return ScaledClock(
        int(announcement["originTime"]), float(announcement["originMonotonic"]), float(announcement["speed"])
    )


@asynccontextmanager
async def embedded_exchange(settings: SimSettings, state: Path) -> AsyncIterator[SimulatedVenue]:
    """Run an own simulated exchange while the block runs. Its account and clock survive in `state`.

    Raises: SettingsInvalid: it refused its settings; VenueUnavailable: it did not start.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "service",
        "sim",
        *_arguments(settings, state),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        start_new_session=True,  # Ctrl-C reaches the daemon alone, which then ends this process itself
        limit=LINE_LIMIT_BYTES,
    )
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        async with asyncio.timeout(START_LIMIT_S):
            announcement = await _announcement(process.stdout, process)
        async with asyncio.TaskGroup() as tasks:
            watch = tasks.create_task(_watch(process), name="exchange.embedded.watch")
            yield SimulatedVenue(
                rest_url=announcement["rest_url"],
                stream_url=announcement["stream_url"],
                clock=clock_from(announcement),
                end_ms=int(announcement.get("endTime") or 0),
                pid=process.pid,
            )
            watch.cancel()
            process.stdin.close()  # end of input: it saves its state and leaves
            await asyncio.gather(_stopped(process), _relay(process.stdout))
    except TimeoutError:
        raise VenueUnavailable(f"the simulated exchange did not start within {START_LIMIT_S:.0f} s") from None
    finally:
        if process.returncode is None:
            process.stdin.close()
            await _stopped(process)


def _arguments(settings: SimSettings, state: Path) -> list[str]:
    arguments = {
        "--port": 0,
        "--speed": settings.speed,
        "--symbols": settings.symbols,
        "--seed": settings.seed,
        "--deposit": settings.deposit,
        "--maker-fee": settings.maker_fee_fraction,
        "--taker-fee": settings.taker_fee_fraction,
        "--spread-bps": settings.spread_bps,
        "--slippage-bps": settings.slippage_bps_per_million,
        "--latency-ms": settings.latency_ms,
        "--stream-messages": settings.stream_messages_per_s,
        "--state": state,
        "--key": f"{SIM_KEY}:{SIM_SECRET}",
    }
    optional = {"--replay": settings.replay, "--from": settings.from_time, "--until": settings.until_time}
    arguments.update({flag: value for flag, value in optional.items() if value})
    return ["--parent", *(str(word) for pair in arguments.items() for word in pair)]


async def _announcement(stdout: asyncio.StreamReader, process: asyncio.subprocess.Process) -> dict[str, Any]:
    """Its lines up to the one that says it is ready."""
    problem = ""
    async for line in stdout:
        entry = _decoded(line)
        if entry.get("message") == "simulated exchange ready":
            return entry
        if entry.get("level") == "error":
            problem = str(entry.get("message", ""))
    code = await process.wait()
    words = problem or f"the simulated exchange ended with exit code {code} before it was ready"
    raise SettingsInvalid(words) if code == EXIT_SETTINGS else VenueUnavailable(words)


def _decoded(line: bytes) -> dict[str, Any]:
    try:
        entry = msgspec.json.decode(line)
    except msgspec.DecodeError:
        return {"message": line.decode(errors="replace").rstrip(), "level": "error"}
    return entry if isinstance(entry, dict) else {"message": str(entry)}


async def _watch(process: asyncio.subprocess.Process) -> None:
    """Relay its lines while it lives. It never ends by itself: when it does, so does the run."""
    assert process.stdout is not None
    await _relay(process.stdout)
    code = await process.wait()
    raise VenueUnavailable(
        f"the simulated exchange ended with exit code {code}; run perpd again to go on from its last state"
    )


async def _relay(stdout: asyncio.StreamReader) -> None:
    """Its warnings and errors become ours; the rest is dropped, so that the pipe never fills."""
    async for line in stdout:
        entry = _decoded(line)
        level = entry.pop("level", "info")
        message = entry.pop("message", "")
        for key in ("timestamp", "logger", "event"):
            entry.pop(key, None)
        if level in ("warn", "warning"):
            log.warning(f"simulated exchange: {message}", **entry)
        elif level == "error":
            log.error(f"simulated exchange: {message}", **entry)


async def _stopped(process: asyncio.subprocess.Process) -> None:
    try:
        async with asyncio.timeout(STOP_LIMIT_S):
            await process.wait()
    except TimeoutError:
        log.error("simulated exchange did not stop, killing it", pid=process.pid)
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
