"""Log lines: one JSON object a line on stdout, or colour on a terminal; never a secret, never stderr.

Keys: `message`, `level` (debug, info, warn, error), `timestamp` (wall time, ISO 8601, UTC, ms), `logger`,
then the caller's fields with their types. Railway files whatever arrives on stderr as an error, so
stdlib logging, warnings, unhandled exceptions and stray prints to stderr all become lines of ours.
"""

import contextlib
import dataclasses
import json
import logging
import math
import os
import re
import sys
import threading
import time
import traceback
import types
import urllib.parse
import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from enum import Enum
from typing import Any, Protocol, TextIO

import msgspec
import structlog

from service.errors import PerpdError
from service.settings import LogSettings

REDACTED = "[redacted]"
RUN_SUMMARY = "run summary"

_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warn": logging.WARNING, "error": logging.ERROR}
_LEVEL_NAMES = {
    "warning": "warn",
    "critical": "error",
    "fatal": "error",
    "exception": "error",
    "notset": "debug",
}
_OWN_KEYS = frozenset(("message", "level", "timestamp", "logger"))

# A line is for reading: what is longer is cut and says so.
_TEXT_LIMIT = 16_384
_SCANNED_LIMIT = 8 * _TEXT_LIMIT  # what is searched for secrets of a longer text: its two ends
_ITEMS_LIMIT = 200
_DEPTH_LIMIT = 6
_REPEAT_TABLE_LIMIT = 1_024

_SECRET_NAME = (
    r"x-mbx-apikey|api[_-]?key|api[_-]?secret|secret[_-]?key|signature|listen[_-]?key"
    r"|binance[_-]?(?:key|secret)|pgpassword|password|passwd"
)
_SECRET_FIELD = re.compile(rf"(?:.*_)?(?:{_SECRET_NAME}|secret|authorization)", re.IGNORECASE)
_SECRET_PATTERNS: tuple[tuple[re.Pattern[str], str], ...] = (
    # signature=..., "apiKey": "...", 'X-MBX-APIKEY': '...', ('X-MBX-APIKEY', '...'); JSON inside a string too
    (
        re.compile(
            rf"""({_SECRET_NAME})(\\?["']?\s*[=:]\s*b?\\?["']?|["']\s*,\s*b?["'])([^\s"'&,;)}}\]\\]+)""",
            re.IGNORECASE,
        ),
        rf"\1\2{REDACTED}",
    ),
    (re.compile(r"\b(bearer\s+)[\w.~+/=-]+", re.IGNORECASE), rf"\1{REDACTED}"),
    # The user-data stream's path ends in the listen key; stream names hold an @ and stay readable.
    (re.compile(r"(/ws/)[A-Za-z0-9]{20,}(?![@A-Za-z0-9_])"), rf"\1{REDACTED}"),
    # scheme://user:password@host, as in DATABASE_URL; bounded, or a long text would take quadratic time
    (re.compile(r"(://[^\s:/@]{0,128}:)[^\s/@]{1,256}(@)"), rf"\1{REDACTED}\2"),
)


class Redactor:
    """Takes secrets out of text: exact values it was given, and what looks like one."""

    def __init__(self, secrets: Sequence[str] = ()) -> None:
        forms = {form for secret in secrets if secret for form in _written_forms(secret)}
        # The longest first, or a secret that contains another would leave its rest behind.
        alternatives = "|".join(re.escape(form) for form in sorted(forms, key=len, reverse=True))
        self._exact = re.compile(alternatives) if forms else None

    def text(self, text: str) -> str:
        if self._exact is not None:
            text = self._exact.sub(REDACTED, text)
        for pattern, replacement in _SECRET_PATTERNS:
            text = pattern.sub(replacement, text)
        return text


def _written_forms(secret: str) -> Iterable[str]:
    """How a secret may stand in a line: plain, percent-encoded, escaped as in JSON or by repr."""
    yield secret
    yield urllib.parse.quote(secret, safe="")
    yield urllib.parse.quote_plus(secret)
    yield json.dumps(secret)[1:-1]
    yield repr(secret)[1:-1]


class RepeatLimit:
    """Lets `repeats` equal lines through in each window of `window_s` and counts what it held back.

    The table is bounded: beyond its size the line that began its window first is forgotten.
    """

    def __init__(
        self, window_s: float, repeats: int, monotonic_s: Callable[[], float] = time.monotonic
    ) -> None:
        self._window_s = window_s
        self._repeats = repeats
        self._monotonic_s = monotonic_s
        self._windows: OrderedDict[tuple[str, str], list[float]] = OrderedDict()  # start_s, passed, held

    def admit(self, logger: str, message: str) -> int | None:
        """None when the line is to be dropped, else how many were dropped since the last that passed."""
        if self._window_s <= 0:
            return 0
        now_s = self._monotonic_s()
        key = (logger, message)
        window = self._windows.get(key)
        if window is not None and now_s - window[0] < self._window_s:
            if window[1] < self._repeats:
                window[1] += 1
                return 0
            window[2] += 1
            return None
        held = int(window[2]) if window is not None else 0
        self._windows[key] = [now_s, 1, 0]
        self._windows.move_to_end(key)
        if len(self._windows) > _REPEAT_TABLE_LIMIT:
            self._windows.popitem(last=False)
        return held

    def __len__(self) -> int:
        return len(self._windows)


class _Render(Protocol):
    def __call__(self, line: dict[str, Any]) -> str: ...


class _Output:
    """Where every line passes: limit, redact, render, write. Nothing it meets is raised to the caller."""

    def __init__(
        self,
        stream: TextIO,
        render: _Render,
        redactor: Redactor,
        limit: RepeatLimit,
        unlimited: Collection[str],
    ) -> None:
        self._stream = stream
        self._render = render
        self._redactor = redactor
        self._limit = limit
        self._unlimited = frozenset(unlimited)
        # Reentrant: a signal handler may log while the main thread is inside `emit`.
        self._lock = threading.RLock()

    def emit(self, logger: str, level: str, message: object, fields: dict[str, Any]) -> None:
        try:
            with self._lock:
                self._emit(logger, level, message if isinstance(message, str) else str(message), fields)
        except Exception as error:  # noqa: BLE001 - a log line must never stop what it reports on
            self._emit_failure(logger, level, error)

    def _emit(self, logger: str, level: str, message: str, fields: dict[str, Any]) -> None:
        suppressed = 0
        if message not in self._unlimited:
            admitted = self._limit.admit(logger, message)
            if admitted is None:
                return
            suppressed = admitted
        line: dict[str, Any] = {
            "message": plain(message, self._redactor),
            "level": level,
            "timestamp": _timestamp(),
            "logger": logger,
        }
        _add_exception(fields)
        for name, value in fields.items():
            line[f"{name}_" if name in _OWN_KEYS else name] = plain_field(name, value, self._redactor)
        if suppressed:
            line["suppressed"] = suppressed
        self._write(self._render(line))

    def _emit_failure(self, logger: str, level: str, error: Exception) -> None:
        """Say that a line was lost, in words that cannot fail: the error's type only."""
        line = {
            "message": "a log line could not be rendered",
            "level": level,
            "timestamp": _timestamp(),
            "logger": logger,
            "error": type(error).__name__,
        }
        with contextlib.suppress(Exception):  # nowhere is left to say it
            self._write(self._render(line))

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text + "\n")
            self._stream.flush()
        except BrokenPipeError:
            # Nobody reads any more (`perpd run | head`): at exit the interpreter would complain on stderr.
            self._stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - it lives as long as the process
            if sys.stdout is not None:
                os.dup2(self._stream.fileno(), sys.stdout.fileno())
        except (OSError, ValueError):
            return  # a full disk behind stdout, or a closed stream: the daemon's work goes on


def _timestamp() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").removesuffix("+00:00") + "Z"


def _add_exception(fields: dict[str, Any]) -> None:
    """Replace `exc_info` by the traceback's text, under `exception`."""
    fields.pop("stack_info", None)
    exc_info = fields.pop("exc_info", None)
    if not exc_info:
        return
    if isinstance(exc_info, BaseException):
        error: BaseException | None = exc_info
    elif isinstance(exc_info, tuple):
        error = exc_info[1]
    else:
        error = sys.exc_info()[1]
    if error is not None:
        fields["exception"] = "".join(traceback.format_exception(error)).rstrip()


def plain_field(name: str, value: object, redactor: Redactor) -> Any:
    """A field as JSON knows it; hidden altogether where its name says that it is a secret."""
    if value is not None and _SECRET_FIELD.fullmatch(name):
        return REDACTED
    return plain(value, redactor)


def plain(value: object, redactor: Redactor, depth: int = 0) -> Any:
    """What JSON can say of a value. Decimal: its text; Enum: its value; a float that is not finite: None."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Enum):
        return plain(value.value, redactor, depth)
    if isinstance(value, str):
        return _plain_text(value, redactor)
    if isinstance(value, int):
        return value if -(2**63) <= value < 2**64 else str(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Decimal):
        return str(value)
    if isinstance(value, BaseException):
        return _plain_text(f"{type(value).__name__}: {value}", redactor)
    if isinstance(value, bytes | bytearray):
        return _plain_text(bytes(value[:_TEXT_LIMIT]).decode("utf-8", "backslashreplace"), redactor)
    if isinstance(value, datetime | date):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if depth >= _DEPTH_LIMIT:
        return _plain_text(repr(value), redactor)
    return _plain_container(value, redactor, depth)


def _plain_container(value: object, redactor: Redactor, depth: int) -> Any:
    if isinstance(value, msgspec.Struct):
        value = msgspec.structs.asdict(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return _plain_mapping(value, redactor, depth)
    if not isinstance(value, list | tuple | set | frozenset):
        to_list = getattr(type(value), "tolist", None)  # numpy scalars and arrays, array.array
        if to_list is None:
            return _plain_text(str(value), redactor)
        value = to_list(value)
        if not isinstance(value, list):
            return plain(value, redactor, depth + 1)
    items = [plain(item, redactor, depth + 1) for _, item in zip(range(_ITEMS_LIMIT), value, strict=False)]
    if len(value) > _ITEMS_LIMIT:
        items.append(f"... {len(value) - _ITEMS_LIMIT} more")
    return items


def _plain_mapping(value: Mapping[Any, Any], redactor: Redactor, depth: int) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, item in value.items():
        if len(result) == _ITEMS_LIMIT:
            result["..."] = f"{len(value) - _ITEMS_LIMIT} more"
            break
        name = plain(key, redactor, depth + 1)
        name = name if isinstance(name, str) else str(name)
        hidden = item is not None and _SECRET_FIELD.fullmatch(name)
        result[name] = REDACTED if hidden else plain(item, redactor, depth + 1)
    return result


def _plain_text(text: str, redactor: Redactor) -> str:
    text = str(text)
    left_out = max(0, len(text) - _SCANNED_LIMIT)
    if left_out:
        # This seam is never shown: it lies in what is cut below.
        text = text[: _SCANNED_LIMIT // 2] + text[-_SCANNED_LIMIT // 2 :]
    # Redacted before it is cut, or half a secret could stand at the cut.
    text = redactor.text(text)
    if len(text) > _TEXT_LIMIT:
        half = _TEXT_LIMIT // 2
        left_out += len(text) - 2 * half
        text = f"{text[:half]} ... {left_out} characters left out ... {text[-half:]}"
    # A lone surrogate cannot be written as UTF-8.
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode("utf-8")


def _render_json(line: dict[str, Any]) -> str:
    return msgspec.json.encode(line).decode("utf-8")


class _RenderConsole:
    """Readable lines; colour on a terminal."""

    def __init__(self, *, colour: bool) -> None:
        self._console = structlog.dev.ConsoleRenderer(
            colors=colour, sort_keys=False, exception_formatter=structlog.dev.plain_traceback
        )

    def __call__(self, line: dict[str, Any]) -> str:
        # A venue's text must not steer the terminal.
        safe = {
            key: value.replace("\x1b", "\\x1b") if isinstance(value, str) else value
            for key, value in line.items()
        }
        safe["event"] = safe.pop("message")
        return str(self._console(None, str(line["level"]), safe))


class _NamedLogger:
    """What structlog hands rendered lines to; here it only carries the name."""

    def __init__(self, name: str) -> None:
        self.name = name


class _LinesToLog(logging.Handler):
    """Routes stdlib logging (asyncio, aiohttp and whatever else is imported) into our lines."""

    def __init__(self, output: _Output) -> None:
        super().__init__()
        self._output = output

    def emit(self, record: logging.LogRecord) -> None:
        try:
            message = record.getMessage()
        except Exception:  # noqa: BLE001 - a library's bad format string is its text, not our failure
            message = str(record.msg)
        fields: dict[str, Any] = {"exc_info": record.exc_info} if record.exc_info else {}
        self._output.emit(record.name, _level_name(record.levelno), message, fields)


def _level_name(level: int) -> str:
    if level >= logging.ERROR:
        return "error"
    if level >= logging.WARNING:
        return "warn"
    return "info" if level >= logging.INFO else "debug"


class _StderrLines:
    """Stands in for sys.stderr: each line written there becomes a log line."""

    encoding = "utf-8"
    errors = "backslashreplace"
    closed = False

    def __init__(self, output: _Output, real: TextIO) -> None:
        self._output = output
        self._real = real
        self._rest = ""

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            if line.strip():
                self._output.emit("stderr", "warn", line, {})
        if len(self._rest) > _TEXT_LIMIT:
            self._rest = ""
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """A part of a line waits for its end."""

    def isatty(self) -> bool:
        return False

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._real.fileno()  # faulthandler writes to the descriptor itself


def configure(
    settings: LogSettings,
    *,
    stream: TextIO | None = None,
    secrets: Sequence[str] = (),
    unlimited: Collection[str] = (RUN_SUMMARY,),
) -> None:
    """Send every log line of this process to `stream` (default: stdout). May be called again.

    Args: secrets: exact values that must never appear; unlimited: messages that are never suppressed.
    Format auto is JSON unless `stream` is a terminal; under the journal (JOURNAL_STREAM) it is JSON.
    """
    target = sys.stdout if stream is None else stream
    limit = RepeatLimit(settings.repeat_window_s, settings.repeats_per_window)
    output = _Output(target, _renderer(settings, target), Redactor(secrets), limit, unlimited)
    level = _LEVELS[settings.level]
    _configure_structlog(output, level)
    _route_logging(output, level)
    _route_warnings(output)
    _route_uncaught(output)
    if stream is None and not _is_terminal(target):
        real = sys.stderr if not isinstance(sys.stderr, _StderrLines) else sys.stderr._real
        if real is not None:
            sys.stderr = _StderrLines(output, real)


def set_level(level: str) -> None:
    """Change the lowest level that is written, and nothing else. Args: level: as in the settings."""
    number = _LEVELS[level]
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(number))
    _route_level(number)


def _is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty()
    except (AttributeError, ValueError):
        return False


def _renderer(settings: LogSettings, stream: TextIO) -> _Render:
    terminal = _is_terminal(stream)
    if settings.format == "console" or (
        settings.format == "auto" and terminal and "JOURNAL_STREAM" not in os.environ
    ):
        return _RenderConsole(colour=terminal and "NO_COLOR" not in os.environ)
    return _render_json


def _configure_structlog(output: _Output, level: int) -> None:
    def emit(
        logger: _NamedLogger, method: str, event: structlog.typing.EventDict
    ) -> structlog.typing.EventDict:
        fields = dict(event)
        message = fields.pop("event", "")
        output.emit(logger.name, _LEVEL_NAMES.get(method, method), message, fields)
        raise structlog.DropEvent

    structlog.configure(
        processors=[emit],
        # Below the level a call costs a lookup and nothing is rendered.
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda name="perpd", *_: _NamedLogger(str(name)),
        # Loggers are made at import, before settings are known: they must follow a later configure.
        cache_logger_on_first_use=False,
    )


def _route_logging(output: _Output, level: int) -> None:
    root = logging.getLogger()
    root.handlers[:] = [_LinesToLog(output)]
    _route_level(level)
    logging.raiseExceptions = False  # a handler's own failure would go to stderr


def _route_level(level: int) -> None:
    logging.getLogger().setLevel(level)
    logging.getLogger("picows").setLevel(max(level, logging.WARNING))  # it tells of every connection


def _route_warnings(output: _Output) -> None:
    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        fields = {"category": category.__name__, "file": filename, "line": lineno}
        output.emit("warnings", "warn", str(message), fields)

    warnings.showwarning = show


def _route_uncaught(output: _Output) -> None:
    def uncaught(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
        output.emit(
            "perpd", "error", "unhandled exception", {"error": error, "exc_info": error.with_traceback(trace)}
        )

    def uncaught_in_thread(args: threading.ExceptHookArgs) -> None:
        if args.exc_value is not None and not isinstance(args.exc_value, SystemExit):
            name = args.thread.name if args.thread else ""
            fields = {"error": args.exc_value, "thread": name, "exc_info": args.exc_value}
            output.emit("perpd", "error", "unhandled exception in a thread", fields)

    def unraisable(args: "sys.UnraisableHookArgs") -> None:
        fields = {"error": args.exc_value, "where": repr(args.object), "exc_info": args.exc_value}
        output.emit("perpd", "error", args.err_msg or "exception that could not be raised", fields)

    sys.excepthook = uncaught
    threading.excepthook = uncaught_in_thread
    sys.unraisablehook = unraisable


def log_failure(error: PerpdError) -> None:
    """The one line for the error that ends a command: what, where, what to do, and which exit code."""
    fields = {"advice": error.advice} if error.advice else {}
    structlog.get_logger("perpd").error(
        str(error), kind=type(error).__name__, exit_code=error.exit_code, **fields
    )
