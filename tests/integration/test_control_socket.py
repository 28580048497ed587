"""The control socket over a real path: its mode, its bounds and what it answers."""

import asyncio
import contextlib
import json
import socket
import stat
import threading
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from service.clock import WallClock
from service.errors import DaemonUnreachable
from service.monitor.asking import ask
from service.monitor.control import SOCKET_NAME, BadQuestion, controlling, short_path
from service.monitor.explained import HeapMarks
from service.monitor.guard import MemoryGuard
from service.monitor.memory import MemorySampler
from service.monitor.memory_command import lines
from service.monitor.performance import PerformanceMonitor
from service.monitor.report import MemoryReport
from service.settings import MonitorSettings


async def echo(question: Mapping[str, Any]) -> Mapping[str, Any]:
    if question.get("bad"):
        raise BadQuestion("that is bad")
    return {"said": question["word"]}


async def asked(directory: Path, question: dict[str, Any]) -> dict[str, Any]:
    return await asyncio.to_thread(ask, directory, question, 20.0)


@asynccontextmanager
async def connected(directory: Path) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    client = socket.socket(socket.AF_UNIX)
    with short_path(directory) as path:
        client.connect(path)
    reader, writer = await asyncio.open_unix_connection(sock=client)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def ended(reader: asyncio.StreamReader) -> bool:
    """Whether the daemon closed the connection without a word."""
    try:
        return await reader.read() == b""
    except ConnectionError:
        return True


async def test_only_the_owner_may_use_it_and_it_goes_with_the_daemon(tmp_path: Path) -> None:
    async with controlling(tmp_path, {"echo": echo}):
        assert stat.S_IMODE((tmp_path / SOCKET_NAME).stat().st_mode) == 0o600
    assert not (tmp_path / SOCKET_NAME).exists()


async def test_one_question_gets_one_answer(tmp_path: Path) -> None:
    async with controlling(tmp_path, {"echo": echo}):
        assert await asked(tmp_path, {"ask": "echo", "word": "hello"}) == {"said": "hello"}


async def test_a_path_longer_than_a_socket_may_have_works(tmp_path: Path) -> None:
    directory = tmp_path / ("d" * 120)
    directory.mkdir()
    async with controlling(directory, {"echo": echo}):
        assert await asked(directory, {"ask": "echo", "word": "far"}) == {"said": "far"}


async def test_a_socket_that_a_crash_left_is_replaced(tmp_path: Path) -> None:
    with short_path(tmp_path) as path, socket.socket(socket.AF_UNIX) as left:
        left.bind(path)
    async with controlling(tmp_path, {"echo": echo}):
        assert await asked(tmp_path, {"ask": "echo", "word": "new"}) == {"said": "new"}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"hello\n", "not one JSON object"),
        (b"[]\n", "not one JSON object"),
        (b'{"ask": "money"}\n', "ask is one of echo"),
        (b'{"ask": "echo", "bad": true}\n', "that is bad"),
    ],
)
async def test_a_wrong_question_is_answered_in_words(tmp_path: Path, line: bytes, words: str) -> None:
    async with controlling(tmp_path, {"echo": echo}), connected(tmp_path) as (reader, writer):
        writer.write(line)
        assert words in json.loads(await reader.readline())["error"]


async def test_a_question_without_end_is_cut_off(tmp_path: Path) -> None:
    async with controlling(tmp_path, {"echo": echo}), connected(tmp_path) as (reader, writer):
        writer.write(b"x" * 10_000)
        assert await ended(reader)


async def test_more_clients_than_it_serves_are_turned_away(tmp_path: Path) -> None:
    async with controlling(tmp_path, {"echo": echo}):
        async with (
            connected(tmp_path),
            connected(tmp_path),
            connected(tmp_path),
            connected(tmp_path),
            connected(tmp_path) as (fifth, _),
        ):
            assert await ended(fifth)
        async with asyncio.timeout(10):
            while True:  # until it noticed that the others left
                try:
                    assert await asked(tmp_path, {"ask": "echo", "word": "now"}) == {"said": "now"}
                    return
                except DaemonUnreachable:
                    continue


async def test_a_client_that_leaves_cancels_what_it_asked_for(tmp_path: Path) -> None:
    begun, cancelled = asyncio.Event(), asyncio.Event()

    async def long(question: Mapping[str, Any]) -> Mapping[str, Any]:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()
        return {}

    async with controlling(tmp_path, {"long": long}), asyncio.timeout(10):
        async with connected(tmp_path) as (_, writer):
            writer.write(b'{"ask": "long"}\n')
            await begun.wait()
        await cancelled.wait()


async def test_the_end_of_the_daemon_does_not_wait_for_a_client(tmp_path: Path) -> None:
    begun = asyncio.Event()

    async def long(question: Mapping[str, Any]) -> Mapping[str, Any]:
        begun.set()
        return await asyncio.Event().wait() or {}

    async with asyncio.timeout(10), contextlib.AsyncExitStack() as later:
        async with controlling(tmp_path, {"long": long}):
            reader, writer = await later.enter_async_context(connected(tmp_path))
            writer.write(b'{"ask": "long"}\n')
            await begun.wait()
        assert await ended(reader)


def test_without_a_daemon_the_command_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DaemonUnreachable, match="is it running"):
        ask(tmp_path, {"ask": "memory"}, 5.0)
    with pytest.raises(DaemonUnreachable, match="is it running"):
        ask(tmp_path / "nowhere", {"ask": "memory"}, 5.0)


class NoWorkers:
    workers = 0

    def resize(self, workers: int) -> None: ...

    def replace_workers(self, reason: str) -> None: ...


@pytest.fixture
def report() -> MemoryReport:
    settings = MonitorSettings()
    sampler = MemorySampler(1_000)
    guard = MemoryGuard(
        settings,
        sampler,
        PerformanceMonitor(settings, WallClock()),
        workers=NoWorkers(),
        shrink=lambda on: None,
        flush_early=lambda on: None,
        quiet=lambda on: None,
        stop=lambda reason: None,
    )
    marks = HeapMarks()
    marks.parts["everything"] = lambda: 4_096
    return MemoryReport(sampler, guard, marks)


async def test_the_report_names_processes_parts_objects_tasks_and_descriptors(
    report: MemoryReport, tmp_path: Path
) -> None:
    async with controlling(tmp_path, {"memory": report.answer}):
        answer = await asked(tmp_path, {"ask": "memory"})
    own = answer["processes"][0]
    assert 0 < own["uss_bytes"] <= own["pss_bytes"] <= own["rss_bytes"]
    assert sum(own["parts"].values()) + answer["unexplained_bytes"] == own["pss_bytes"]
    assert answer["budget"]["limit_mb"] == 1_000
    assert own["parts"]["everything"] == 4_096
    assert answer["history"]["minutes"][-1][2] == pytest.approx(answer["budget"]["pss_mb"], rel=0.01)
    assert len(answer["objects"]["by_type"]) == 15
    assert answer["tasks"]["total"] >= 2
    assert answer["file_descriptors"]["total"] > 3
    assert "trace" not in answer
    text = "\n".join(lines(answer))
    assert "level normal" in text
    assert "everything" in text
    assert "% of the daemon's own process" in text
    assert "last hour, PSS" in text


async def test_a_trace_shows_the_line_that_allocated_and_stops(report: MemoryReport, tmp_path: Path) -> None:
    import tracemalloc

    kept = []
    async with controlling(tmp_path, {"memory": report.answer}), asyncio.timeout(30):
        asking = asyncio.create_task(asked(tmp_path, {"ask": "memory", "trace_s": 0.2}))
        while not tracemalloc.is_tracing():  # noqa: ASYNC110 - the tracer has no event for it
            await asyncio.sleep(0.001)
        while tracemalloc.is_tracing():
            kept.append(bytearray(20_000))
            await asyncio.sleep(0.005)
        answer = await asking
    assert "test_control_socket.py" in answer["trace"]["lines"][0]["line"]
    assert answer["trace"]["lines"][0]["bytes"] > 20_000
    assert not tracemalloc.is_tracing()


async def test_a_trace_that_is_cancelled_while_it_compares_does_not_hold_the_loop(
    report: MemoryReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    comparing, enough, over = (threading.Event() for _ in range(3))

    def compare(before: object, after: object) -> list[dict[str, object]]:
        comparing.set()
        enough.wait(20)  # as a large heap would
        over.set()
        return []

    monkeypatch.setattr("service.monitor.report._compare", compare)
    asking = asyncio.create_task(report.answer({"ask": "memory", "trace_s": 0.01}))
    await asyncio.to_thread(comparing.wait, 20)
    asking.cancel()
    await asyncio.wait({asking})
    ended_first = not over.is_set()
    enough.set()
    assert asking.cancelled()
    assert ended_first


async def test_a_trace_beyond_its_bounds_is_refused(report: MemoryReport, tmp_path: Path) -> None:
    async with controlling(tmp_path, {"memory": report.answer}):
        with pytest.raises(DaemonUnreachable, match="trace_s is 0 to 3600"):
            await asked(tmp_path, {"ask": "memory", "trace_s": 1e9})
