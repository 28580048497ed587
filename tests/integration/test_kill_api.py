"""The kill switch over HTTP: a real socket, a token, and what a stranger gets."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

import aiohttp
import pytest
from structlog.testing import capture_logs

from service.monitor.control import BadQuestion
from service.web import kill
from service.web.kill import kill_api
from service.web.server import BODY_LIMIT_BYTES, serving
from tests.integration.trading_desk import until

TOKEN = "s3cret"
asked: list[Mapping[str, Any]] = []


async def answer(question: Mapping[str, Any]) -> Mapping[str, Any]:
    asked.append(question)
    if question["do"] == "resume" and not question["reason"]:
        raise BadQuestion("resuming needs a reason")
    return {"level": question["do"]}


@pytest.fixture
async def port() -> AsyncIterator[int]:
    asked.clear()
    pages = {"health": dict, "ready": lambda: (True, {}), "metrics": str}
    async with serving("127.0.0.1", 0, **pages, api=kill_api(TOKEN, answer)) as bound:
        yield bound


async def send(port: int, method: str, path: str, *, token: str | None = TOKEN, body: bytes = b""):
    headers = {"Authorization": f"Bearer {token}"} if token is not None else {}
    url = f"http://127.0.0.1:{port}{path}"
    async with aiohttp.ClientSession() as session:
        async with session.request(method, url, headers=headers, data=body) as reply:
            return reply.status, await reply.json()


@pytest.mark.parametrize(
    ("path", "action"),
    [
        ("stop-entries", "no_entries"),
        ("reduce-only", "reduce_only"),
        ("flatten", "flatten"),
        ("resume", "resume"),
    ],
)
async def test_each_action_is_asked_for_with_its_reason(port: int, path: str, action: str):
    status, found = await send(port, "POST", f"/api/v1/{path}", body=b'{"reason": "news"}')
    assert (status, found) == (200, {"level": action})
    assert asked == [{"do": action, "reason": "news", "by": "HTTP API"}]


async def test_it_is_shown_to_those_who_know_the_token(port: int):
    assert await send(port, "GET", "/api/v1/kill") == (200, {"level": "show"})


@pytest.fixture
def answered_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kill, "WRONG_TOKEN_S", 0.0)


@pytest.mark.usefixtures("answered_at_once")
@pytest.mark.parametrize("token", [None, "", "wrong", "s3cret ", "s3crét"])
async def test_a_stranger_gets_nothing(port: int, token: str | None):
    status, _ = await send(port, "POST", "/api/v1/flatten", token="wrong" if token == "s3cret " else token)
    assert status == 401
    assert asked == []


async def test_a_wrong_token_is_logged_and_waits_while_the_right_one_is_answered(
    port: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(kill, "WRONG_TOKEN_S", 3600.0)
    with capture_logs() as logged:
        stranger = asyncio.create_task(send(port, "POST", "/api/v1/flatten", token="guess"))
        await until(lambda: logged)
        assert await send(port, "GET", "/api/v1/kill") == (200, {"level": "show"})
    assert not stranger.done()
    stranger.cancel()
    refused = {"event": "a wrong API token was refused", "path": "/api/v1/flatten", "given": True}
    assert logged == [{**refused, "log_level": "warning"}]


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/api/v1/flatten", b"", 404),
        ("POST", "/api/v1/kill", b"", 404),
        ("POST", "/api/v1/nothing", b"", 404),
        ("POST", "/api/v1/flatten", b"{", 400),
        ("POST", "/api/v1/flatten", b'{"other": 1}', 400),
        ("POST", "/api/v1/resume", b"", 400),
        ("POST", "/api/v1/flatten", b"x" * (BODY_LIMIT_BYTES + 1), 413),
    ],
)
async def test_what_makes_no_sense_is_refused(port: int, method: str, path: str, body: bytes, status: int):
    assert (await send(port, method, path, body=body))[0] == status


@pytest.mark.parametrize(
    ("length", "status"), [("9" * 5_000, 413), ("1" * 10, 413), ("-1", 400), ("x", 400), ("\u00b2", 400)]
)
async def test_a_length_that_is_none_is_refused_and_nothing_is_read(port: int, length: str, status: int):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /api/v1/flatten HTTP/1.1\r\nContent-Length: {length}\r\n\r\n"
    with capture_logs() as logged:
        writer.write(head.encode("latin-1"))
        async with asyncio.timeout(10):
            assert (await reader.read()).startswith(f"HTTP/1.1 {status} ".encode())
    writer.close()
    assert (asked, logged) == ([], [])


async def test_without_a_token_there_is_no_api():
    pages = {"health": dict, "ready": lambda: (True, {}), "metrics": str}
    async with serving("127.0.0.1", 0, **pages) as port:
        assert (await send(port, "POST", "/api/v1/flatten"))[0] == 404
        assert (await send(port, "GET", "/health"))[0] == 200
