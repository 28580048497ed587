"""The three pages over real sockets, and what a hostile client may send."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Mapping
from typing import Any

import aiohttp
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from service.errors import PortInUse, SettingsInvalid
from service.web import server as web
from service.web.server import parse_request_line, serving
from tests.integration.trading_desk import until


class Pages:
    """What the pages say, as a test sets it."""

    def __init__(self) -> None:
        self.ready: tuple[bool, Mapping[str, Any]] = (True, {"reasons": []})
        self.broken = False

    def health(self) -> Mapping[str, Any]:
        return {"cycle": 3}

    def readiness(self) -> tuple[bool, Mapping[str, Any]]:
        return self.ready

    def metrics(self) -> str:
        if self.broken:
            raise ZeroDivisionError
        return "# TYPE perpd_cycles_total counter\nperpd_cycles_total 3\n"


@pytest.fixture
def pages() -> Pages:
    return Pages()


@pytest.fixture
async def port(pages: Pages) -> AsyncIterator[int]:
    async with serving(
        "127.0.0.1", 0, health=pages.health, ready=pages.readiness, metrics=pages.metrics
    ) as bound:
        yield bound


async def get(port: int, path: str, method: str = "GET") -> tuple[int, str, Mapping[str, str]]:
    async with aiohttp.ClientSession() as session:
        async with session.request(method, f"http://127.0.0.1:{port}{path}") as answer:
            return answer.status, await answer.text(), dict(answer.headers)


async def exchange(port: int, sent: bytes) -> bytes:
    """What the server answers to raw bytes; empty when it just closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        async with asyncio.timeout(10):
            writer.write(sent)
            writer.write_eof()
            return await reader.read()
    except OSError:  # it closed with our bytes unread
        return b""
    finally:
        writer.close()


async def test_health_says_that_the_loop_answers(port: int) -> None:
    status, body, headers = await get(port, "/health")
    assert (status, json.loads(body)) == (200, {"status": "ok", "cycle": 3})
    assert headers["Content-Type"] == "application/json"
    assert headers["Connection"] == "close"


async def test_ready_is_200_or_503_with_reasons(port: int, pages: Pages) -> None:
    assert (await get(port, "/ready"))[0] == 200
    pages.ready = (False, {"reasons": ["archive is not writable"]})
    status, body, _ = await get(port, "/ready?verbose=1")
    assert status == 503
    assert json.loads(body) == {"status": "not ready", "reasons": ["archive is not writable"]}


async def test_metrics_are_prometheus_text(port: int) -> None:
    status, body, headers = await get(port, "/metrics")
    assert (status, headers["Content-Type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    assert body.endswith("perpd_cycles_total 3\n")


async def test_head_gets_the_length_and_no_body(port: int) -> None:
    status, body, headers = await get(port, "/health", "HEAD")
    assert (status, body) == (200, "")
    assert int(headers["Content-Length"]) == len((await get(port, "/health"))[1])


async def test_another_path_is_404_and_another_method_405(port: int) -> None:
    assert (await get(port, "/"))[0] == 404
    status, _, headers = await get(port, "/health", "POST")
    assert (status, headers["Allow"]) == (405, "GET, HEAD")


async def test_a_page_that_fails_is_500_and_logged_and_the_next_request_served(
    port: int, pages: Pages
) -> None:
    pages.broken = True
    with capture_logs() as logged:
        assert (await get(port, "/metrics"))[0] == 500
    assert [(line["event"], line["path"]) for line in logged] == [("a page failed", "/metrics")]
    assert (await get(port, "/health"))[0] == 200


@pytest.mark.parametrize(
    ("sent", "answer"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b"HTTP/1.1 400 "),
        (b"GET\r\n\r\n", b"HTTP/1.1 400 "),
        (b"GET health HTTP/1.1\r\n\r\n", b"HTTP/1.1 400 "),
        (b"GET /\xff HTTP/1.1\r\n\r\n", b"HTTP/1.1 400 "),
        (b"GET /health HTTP/2.0\r\n\r\n", b"HTTP/1.1 505 "),
        (b"GET /health HT", b"HTTP/1.1 400 "),
        (b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\n\r\n", b"HTTP/1.1 431 "),
        (b"GET http://perpd:80/health HTTP/1.1\r\n\r\n", b"HTTP/1.1 200 "),
        (b"GET /health HTTP/1.0\r\n\r\n", b"HTTP/1.1 200 "),
        (b"", b""),
    ],
)
async def test_whatever_arrives_gets_a_proper_answer(port: int, sent: bytes, answer: bytes) -> None:
    received = await exchange(port, sent)
    # A close with unread bytes may reset the connection before the answer is read.
    assert received.startswith(answer) or (len(sent) > web.HEAD_LIMIT_BYTES and received == b"")
    assert (await get(port, "/health"))[0] == 200


@given(st.binary(max_size=200))
def test_any_head_parses_to_a_request_or_a_refusal(head: bytes) -> None:
    parsed = parse_request_line(head)
    assert parsed in (400, 505) or (isinstance(parsed, tuple) and parsed[1].startswith("/"))


async def test_a_client_that_does_not_finish_its_head_is_sent_away(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "HEAD_LIMIT_S", 0.05)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /health HTTP/1.1\r\nX: ")
    async with asyncio.timeout(10):
        assert (await reader.read()).startswith(b"HTTP/1.1 408 ")
    writer.close()


async def test_a_client_that_does_not_read_its_answer_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "ANSWER_LIMIT_S", 0.05)
    long = "x" * 20_000_000  # more than the sockets of both ends take in
    async with serving("127.0.0.1", 0, health=dict, ready=lambda: (True, {}), metrics=lambda: long) as port:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
            client.connect(("127.0.0.1", port))
            client.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
            own = client.getsockname()[1]
            await until(lambda: _sockets_to(own))
            await until(lambda: not _sockets_to(own))


def _sockets_to(port: int) -> list[object]:
    """The sockets of this process that are connected to a client's port."""
    return [one for one in psutil.Process().net_connections("tcp") if one.raddr and one.raddr.port == port]


async def test_beyond_the_limit_connections_are_dropped_and_room_comes_back(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "CONNECTIONS_LIMIT", 2)
    idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
    assert await exchange(port, b"GET /health HTTP/1.1\r\n\r\n") == b""
    for reader, writer in idle:
        writer.write(b"GET /health HTTP/1.1\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 200 ")
        writer.close()
    assert (await exchange(port, b"GET /health HTTP/1.1\r\n\r\n")).startswith(b"HTTP/1.1 200 ")


async def test_an_idle_client_does_not_hold_up_the_end(pages: Pages) -> None:
    async with asyncio.timeout(4):  # less than the limit for a head
        async with serving(
            "127.0.0.1", 0, health=pages.health, ready=pages.readiness, metrics=pages.metrics
        ) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            assert (await get(port, "/health"))[0] == 200
        assert await reader.read() == b""
        writer.close()


async def test_a_port_in_use_names_host_port_and_setting(port: int, pages: Pages) -> None:
    with pytest.raises(PortInUse, match=rf"127\.0\.0\.1:{port} .*web\.port"):
        async with serving(
            "127.0.0.1", port, health=pages.health, ready=pages.readiness, metrics=pages.metrics
        ):
            pass


async def test_a_host_that_is_not_ours_is_a_wrong_setting(pages: Pages) -> None:
    with pytest.raises(SettingsInvalid, match=r"192\.0\.2\.1"):
        async with serving("192.0.2.1", 0, health=pages.health, ready=pages.readiness, metrics=pages.metrics):
            pass


async def test_everywhere_answers_on_ipv4_and_where_there_is_one_on_ipv6(pages: Pages) -> None:
    async with serving("::", 0, health=pages.health, ready=pages.readiness, metrics=pages.metrics) as port:
        assert (await get(port, "/health"))[0] == 200
        if _has_ipv6_loopback():
            reader, writer = await asyncio.open_connection("::1", port)
            writer.write(b"GET /health HTTP/1.1\r\n\r\n")
            assert (await reader.read()).startswith(b"HTTP/1.1 200 ")
            writer.close()


def _has_ipv6_loopback() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False
