"""Log lines as the process writes them: run apart, so that every hook is the real one."""

import json
import os
import pty
import subprocess
import sys
import textwrap
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.logs import REDACTED, Redactor, RepeatLimit, plain

PRELUDE = """
import asyncio, logging, sys, threading, warnings
from dataclasses import dataclass
from datetime import datetime, timedelta, UTC
from decimal import Decimal
from pathlib import Path
import structlog
from service import logs, records
from service.settings import LogSettings
log = structlog.get_logger("part.name")
"""
CONFIGURE = 'logs.configure(LogSettings(), secrets=["hunter2", "p/w d"])\n'


def run(
    body: str, *, configure: str = CONFIGURE, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    script = PRELUDE + configure + textwrap.dedent(body)
    environment = {**os.environ, **(env or {})}
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, env=environment
    )


def logged(
    body: str, *, configure: str = CONFIGURE, env: dict[str, str] | None = None
) -> list[dict[str, Any]]:
    """The lines of a script that must end well and leave stderr empty."""
    result = run(body, configure=configure, env=env)
    assert result.stderr == ""
    assert result.returncode == 0
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_a_line_is_one_json_object_with_its_four_keys_first() -> None:
    (line,) = logged('log.info("candles are here", symbols=200)')
    assert list(line) == ["message", "level", "timestamp", "logger", "symbols"]
    assert (line["message"], line["level"], line["logger"]) == ("candles are here", "info", "part.name")
    assert line["symbols"] == 200
    assert line["timestamp"][10] == "T"
    assert len(line["timestamp"]) == len("2026-11-24T01:41:08.515Z")
    assert line["timestamp"].endswith("Z")


def test_fields_keep_their_types() -> None:
    (line,) = logged(
        """
        @dataclass
        class Part:
            name: str
        log.info("typed", amount=Decimal("1.20"), side=records.Side.BUY, nan=float("nan"),
            infinite=float("-inf"), price=1.5, flag=True, none=None, path=Path("a/b"),
            when=datetime(2026, 1, 1, tzinfo=UTC),
            took=timedelta(seconds=1.5), huge=10**30, items=(1, "x", Decimal("2")), nested={"a": {"b": [1]}},
            part=Part("feed"), update=records.Adjustment(adjustment_id="1", kind="funding",
            symbol="币安人生USDT", amount=Decimal("0.10"), reason="", at_ms=1), raw=b"\\xff",
            surrogate="\\ud800", error=ValueError("no"), message="mine", level="mine")
        """
    )
    fields = {
        key: value for key, value in line.items() if key not in ("message", "level", "timestamp", "logger")
    }
    assert fields == {
        "amount": "1.20",
        "side": "BUY",
        "nan": None,
        "infinite": None,
        "price": 1.5,
        "flag": True,
        "none": None,
        "path": "a/b",
        "when": "2026-01-01T00:00:00+00:00",
        "took": 1.5,
        "huge": str(10**30),
        "items": [1, "x", "2"],
        "nested": {"a": {"b": [1]}},
        "part": {"name": "feed"},
        "update": {
            "adjustment_id": "1",
            "kind": "funding",
            "symbol": "币安人生USDT",
            "amount": "0.10",
            "reason": "",
            "at_ms": 1,
        },
        "raw": "\\xff",
        "surrogate": "\\ud800",
        "error": "ValueError: no",
        "message_": "mine",
        "level_": "mine",
    }
    assert (line["message"], line["level"]) == ("typed", "info")


def test_levels_are_those_the_platform_knows_and_lower_ones_are_not_rendered() -> None:
    lines = logged(
        """
        class Loud:
            def __str__(self): raise SystemExit("a line below the level was rendered")
        log.debug("debug", loud=Loud())
        log.info("info"); log.warning("warn"); log.error("error"); log.critical("critical")
        try: 1 / 0
        except ZeroDivisionError: log.exception("exception")
        """
    )
    assert [line["level"] for line in lines] == ["info", "warn", "error", "error", "error"]
    assert lines[-1]["exception"].endswith("ZeroDivisionError: division by zero")


def test_the_standard_library_s_ways_to_stderr_all_become_lines() -> None:
    lines = logged(
        """
        logging.getLogger("aiohttp.client").warning("connection %s lost", 3)
        logging.getLogger("bad").warning("%d", "not a number")
        warnings.warn("an old call", DeprecationWarning)
        warnings.warn("a risky call")
        print("straight to", "stderr", file=sys.stderr)
        class Broken:
            def __del__(self): raise KeyError("in del")
        broken = Broken(); del broken
        thread = threading.Thread(target=lambda: 1 / 0, name="side"); thread.start(); thread.join()
        async def lose():
            async def fail(): raise OSError("lost")
            task = asyncio.ensure_future(fail()); await asyncio.sleep(0); await asyncio.sleep(0); del task
        asyncio.run(lose())
        """,
        env={"PYTHONWARNINGS": "default"},
    )
    seen = [(line["logger"], line["level"], line["message"]) for line in lines]
    assert seen == [
        ("aiohttp.client", "warn", "connection 3 lost"),
        ("bad", "warn", "%d"),
        ("warnings", "warn", "an old call"),
        ("warnings", "warn", "a risky call"),
        ("stderr", "warn", "straight to stderr"),
        ("perpd", "error", "exception that could not be raised"),
        ("perpd", "error", "unhandled exception in a thread"),
        ("asyncio", "error", lines[-1]["message"]),
    ]
    assert "OSError: lost" in lines[-1]["exception"]


def test_an_unhandled_exception_is_one_redacted_line_and_the_exit_code_stays() -> None:
    result = run('raise RuntimeError("boom hunter2 postgres://perpd:s3cret@db/perpd")')
    assert result.stderr == ""
    assert result.returncode == 1
    line = json.loads(result.stdout)
    assert (line["level"], line["message"]) == ("error", "unhandled exception")
    assert "Traceback (most recent call last)" in line["exception"]
    assert "hunter2" not in result.stdout
    assert "s3cret" not in result.stdout


def test_an_exit_with_words_is_a_line_too() -> None:
    result = run('sys.exit("cannot go on with hunter2")')
    assert (result.stderr, result.returncode) == ("", 1)
    assert json.loads(result.stdout)["message"] == f"cannot go on with {REDACTED}"


def test_secrets_appear_in_no_line_whatever_way_they_take() -> None:
    result = run(
        """
        log.info("message hunter2", field="hunter2", inside=[{"hunter2": ("hunter2",)}],
            url="?x=p%2Fw+d&y=p/w d")
        logging.getLogger("aiohttp").error("header %s", {"X-MBX-APIKEY": "kkkk"})
        log.info("request", url="/order?symbol=A&timestamp=1&signature=kkkk", api_key="kkkk",
            listenKey="kkkk", headers={"X-MBX-APIKEY": "kkkk", "Authorization": "Bearer kkkk"}, database="postgres://u:kkkk@h:5432/d")
        print("Authorization: Bearer kkkk", file=sys.stderr)
        warnings.warn("apiKey=kkkk")
        def call(secret):
            raise ValueError(f"signature={secret} of {secret!r}")
        try: call("hunter2")
        except ValueError: log.exception("failed")
        try:
            try: call("hunter2")
            except ValueError as error: raise ExceptionGroup("both", [error, KeyError("hunter2")])
        except ExceptionGroup: log.exception("failed too")
        log.info("object", thing=type("Odd", (), {"__repr__": lambda self: "Odd(hunter2)"})())
        """
    )
    assert (result.stderr, result.returncode) == ("", 0)
    assert len(result.stdout.splitlines()) == 8
    for secret in ("hunter2", "kkkk", "p/w d", "p%2Fw"):
        assert secret not in result.stdout
    assert "symbol=A&timestamp=1&signature=[redacted]" in result.stdout


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("GET /x?signature=ab12&recvWindow=5000", "GET /x?signature=[redacted]&recvWindow=5000"),
        ('{"listenKey":"abc","x":1}', '{"listenKey":"[redacted]","x":1}'),
        (r"{\"apiKey\": \"abc\"}", r"{\"apiKey\": \"[redacted]\"}"),
        ("('X-MBX-APIKEY', 'abc')", "('X-MBX-APIKEY', '[redacted]')"),
        ("{b'X-MBX-APIKEY': b'abc'}", "{b'X-MBX-APIKEY': b'[redacted]'}"),
        ("PERPD_API_SECRET=abc", "PERPD_API_SECRET=[redacted]"),
        ("binance_secret: abc", "binance_secret: [redacted]"),
        ("Bearer abc.def", "Bearer [redacted]"),
        ("postgresql://perpd:abc@db:5432/perpd", "postgresql://perpd:[redacted]@db:5432/perpd"),
        ("wss://h/private/ws/" + "a1" * 32, "wss://h/private/ws/[redacted]"),
        ("wss://h/private/ws?listenKey=abc&events=A", "wss://h/private/ws?listenKey=[redacted]&events=A"),
        ("ws://127.0.0.1:80/market/ws/btcusdt@kline_5m", "ws://127.0.0.1:80/market/ws/btcusdt@kline_5m"),
        ("This listenKey does not exist.", "This listenKey does not exist."),
        ("Signature for this request is not valid.", "Signature for this request is not valid."),
        ("reduceOnly order rejected (-2022)", "reduceOnly order rejected (-2022)"),
    ],
)
def test_what_looks_like_a_secret_is_taken_out_and_the_rest_stays(text: str, expected: str) -> None:
    assert Redactor().text(text) == expected


@given(
    st.text(st.characters(blacklist_categories=("Cs",)), min_size=6, max_size=40),
    st.text(max_size=20),
    st.text(max_size=20),
)
def test_an_exact_secret_never_survives(secret: str, before: str, after: str) -> None:
    redactor = Redactor([secret])
    for value in (
        before + secret + after,
        [secret],
        {secret: {"x": (secret,)}},
        ValueError(secret),
        secret.encode(),
    ):
        text = json.dumps(plain(value, redactor), ensure_ascii=False)
        if secret not in REDACTED and secret not in json.dumps(plain("", redactor)):
            assert secret not in text.replace(REDACTED, "")


def test_a_secret_at_the_cut_of_a_long_text_is_gone_whole() -> None:
    secret = "s3cret" * 10
    for padding in range(8_150, 8_200):
        text = plain("x" * padding + secret + "x" * 20_000, Redactor([secret]))
        assert "s3cret" not in text


def test_a_repeated_line_is_limited_and_the_next_one_says_how_many_were_left_out() -> None:
    now_s = 0.0
    limit = RepeatLimit(10.0, 2, lambda: now_s)
    assert [limit.admit("a", "same") for _ in range(5)] == [0, 0, None, None, None]
    assert limit.admit("a", "other") == 0
    assert limit.admit("b", "same") == 0
    now_s = 9.99
    assert limit.admit("a", "same") is None
    now_s = 10.0
    assert limit.admit("a", "same") == 4
    assert limit.admit("a", "same") == 0
    assert limit.admit("a", "same") is None


def test_the_table_of_repeated_lines_is_bounded() -> None:
    limit = RepeatLimit(10.0, 2, lambda: 0.0)
    for number in range(10_000):
        limit.admit("a", str(number))
    assert len(limit) <= 1_024


def test_a_window_of_zero_limits_nothing() -> None:
    limit = RepeatLimit(0.0, 1, lambda: 0.0)
    assert [limit.admit("a", "same") for _ in range(3)] == [0, 0, 0]


def test_errors_are_limited_too_and_the_run_summary_never() -> None:
    lines = logged(
        """
        for _ in range(4): log.error("failed")
        for _ in range(4): log.info("run summary")
        """,
        configure="logs.configure(LogSettings(repeat_window_s=600.0, repeats_per_window=2))\n",
    )
    assert [line["message"] for line in lines] == ["failed"] * 2 + ["run summary"] * 4


def test_suppressed_lines_are_counted_in_the_line_that_passes() -> None:
    lines = logged(
        """
        import time
        for _ in range(5): log.info("same")
        time.sleep(0.6)
        log.info("same", suppressed_by="nobody")
        """,
        configure="logs.configure(LogSettings(repeat_window_s=0.5, repeats_per_window=2))\n",
    )
    assert [line.get("suppressed") for line in lines] == [None, None, 3]


def test_what_cannot_be_rendered_is_said_without_raising() -> None:
    lines = logged(
        """
        class Bad:
            def __str__(self): raise RuntimeError("no text")
            __repr__ = __str__
        loop = []; loop.append(loop)
        log.info("bad", thing=Bad())
        log.info("loop", loop=loop)
        log.info("after")
        """
    )
    assert [line["message"] for line in lines] == ["a log line could not be rendered", "loop", "after"]
    assert lines[0]["error"] == "RuntimeError"


def test_long_values_are_cut() -> None:
    (line,) = logged('log.info("long", text="x" * 1_000_000, items=list(range(10_000)))')
    assert len(line["text"]) < 17_000
    assert "characters left out" in line["text"]
    assert line["items"][-1] == "... 9800 more"


def test_a_reader_that_goes_away_stops_nothing_and_stays_quiet() -> None:
    script = (
        PRELUDE
        + CONFIGURE
        + 'for n in range(5000): log.info(f"line {n}", text="x" * 200)\nPath(sys.argv[1]).touch()'
    )
    read, write = os.pipe()
    os.close(read)
    with open(write, "wb") as out:
        result = subprocess.run(
            [sys.executable, "-c", script, os.devnull], stdout=out, stderr=subprocess.PIPE, timeout=60
        )
    assert (result.stderr, result.returncode) == (b"", 0)


def test_a_full_disk_behind_stdout_stops_nothing() -> None:
    script = PRELUDE + CONFIGURE + 'for n in range(50): log.info(f"line {n}")\nimport os; os._exit(7)'
    with open("/dev/full", "wb") as out:
        result = subprocess.run(
            [sys.executable, "-c", script], stdout=out, stderr=subprocess.PIPE, timeout=60
        )
    assert (result.stderr, result.returncode) == (b"", 7)


@pytest.mark.parametrize(
    ("settings", "env", "expected"),
    [("", {}, "colour"), ('format="json"', {}, "json"), ("", {"JOURNAL_STREAM": "8:1"}, "json")],
)
def test_a_terminal_gets_colour_unless_json_is_asked_for(
    settings: str, env: dict[str, str], expected: str
) -> None:
    ours, theirs = pty.openpty()
    environment = {
        key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "JOURNAL_STREAM")
    }
    script = (
        PRELUDE
        + f'logs.configure(LogSettings({settings}))\nlog.info("hello", amount=Decimal("1.2"), esc="\\x1b[2J")'
    )
    subprocess.run(
        [sys.executable, "-c", script], stdout=theirs, timeout=60, check=True, env={**environment, **env}
    )
    os.close(theirs)
    text = os.read(ours, 65_536).decode()
    os.close(ours)
    assert text.startswith("{") == (expected == "json")
    assert ("\x1b[" in text) == (expected == "colour")
    assert "\x1b[2J" not in text
    assert "1.2" in text


def test_a_second_configure_replaces_the_first_for_loggers_already_made() -> None:
    lines = logged(
        """
        log.debug("before")
        logs.configure(LogSettings(level="debug"))
        log.debug("after")
        print("once", file=sys.stderr)
        """
    )
    assert [line["message"] for line in lines] == ["after", "once"]
