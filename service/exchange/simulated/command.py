"""`perpd sim`: serve a simulated exchange until a signal, or until the parent is gone."""

import argparse
import asyncio
import hashlib
import os
import signal
import socket
import stat
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.errors import EXIT_OK, SettingsInvalid
from service.settings import LogSettings, SimSettings

if TYPE_CHECKING:
    from service.exchange.simulated.server import ServerOptions, Venue
    from service.exchange.simulated.tape import Tape

READY = "simulated exchange ready"
DEFAULT_KEY = "sim-key:sim-secret"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `perpd sim`; defaults are those of the settings' section `sim`."""
    default = SimSettings()
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: loopback)")
    parser.add_argument("--port", type=int, default=0, metavar="P", help="port; 0 takes a free one (default)")
    parser.add_argument(
        "--replay", default=default.replay, metavar="DIR", help="replay recorded candles from DIR"
    )
    parser.add_argument("--funding", type=Path, metavar="FILE", help="recorded funding rates of a replay")
    parser.add_argument("--seed", type=int, default=default.seed, metavar="N", help="seed of the market")
    parser.add_argument("--symbols", type=int, default=default.symbols, metavar="N", help="how many symbols")
    parser.add_argument(
        "--from", dest="from_time", default="", metavar="T", help="market start, ISO 8601, UTC"
    )
    parser.add_argument(
        "--until", dest="until_time", default="", metavar="T", help="market end, ISO 8601, UTC"
    )
    parser.add_argument("--speed", type=float, default=default.speed, metavar="X", help="market s per wall s")
    parser.add_argument(
        "--latency-ms", type=float, default=default.latency_ms, metavar="X", help="answer delay"
    )
    parser.add_argument(
        "--deposit",
        type=_decimal,
        default=Decimal(repr(default.deposit)),
        metavar="X",
        help="quote currency in each account at the start",
    )
    for name, value, text in (
        ("--maker-fee", default.maker_fee_fraction, "fraction of the notional, resting orders"),
        ("--taker-fee", default.taker_fee_fraction, "fraction of the notional, taking orders"),
        ("--spread-bps", default.spread_bps, "ask over bid, in hundredths of a percent"),
        ("--slippage-bps", default.slippage_bps_per_million, "per million of notional taken at once"),
    ):
        parser.add_argument(name, type=_decimal, default=Decimal(repr(value)), metavar="X", help=text)
    parser.add_argument(
        "--stream-messages",
        type=int,
        default=default.stream_messages_per_s,
        metavar="N",
        help="stream messages per wall second before forming candles are thinned",
    )
    parser.add_argument("--state", type=Path, metavar="FILE", help="keep accounts and market time here")
    parser.add_argument(
        "--key",
        action="append",
        metavar="KEY:SECRET",
        help=f"an API key; may be repeated (default {DEFAULT_KEY})",
    )
    parser.add_argument(
        "--faults",
        type=Path,
        metavar="FILE",
        help="disturb clients as this TOML file says (docs/simulation.md)",
    )
    parser.add_argument("--parent", action="store_true", help="save and exit when standard input ends")


def _decimal(text: str) -> Decimal:
    try:
        value = Decimal(text)
    except InvalidOperation:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not value.is_finite() or value < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number >= 0")
    return value


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM, SIGINT or, with --parent, the end of standard input.

    Raises: PortInUse, SettingsInvalid.
    """
    from service.exchange.simulated.server import listen
    from service.logs import configure

    configure(LogSettings())
    _check(args)
    keys = parse_keys(args.key or [DEFAULT_KEY])
    with listen(args.host, args.port) as listener:  # before the market is made: that takes a while
        tape = open_tape(args)
        options = server_options(args, tape, keys)
        import uvloop

        code: int = uvloop.run(_serve(args, tape, options, listener))
        return code


def _check(args: argparse.Namespace) -> None:
    checks = (
        (args.speed > 0 and args.speed <= 100_000, "--speed", args.speed, "above 0, at most 100000"),
        (1 <= args.symbols <= 700, "--symbols", args.symbols, "1 to 700"),
        (args.seed >= 0, "--seed", args.seed, "0 or more"),
        (args.latency_ms >= 0, "--latency-ms", args.latency_ms, "0 or more"),
        (args.stream_messages >= 1, "--stream-messages", args.stream_messages, "1 or more"),
        (0 <= args.port <= 65_535, "--port", args.port, "0 to 65535"),
        (args.deposit > 0, "--deposit", args.deposit, "above 0"),
    )
    for valid, name, found, allowed in checks:
        if not valid:
            raise SettingsInvalid(f"{name}: found {found}, allowed is {allowed}")
    if args.parent and not _stdin_is_a_pipe():
        raise SettingsInvalid("--parent: standard input must be a pipe that the parent holds open")


def _stdin_is_a_pipe() -> bool:
    if sys.stdin is None or sys.stdin.closed:
        return False
    mode = os.fstat(sys.stdin.fileno()).st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


def parse_keys(pairs: list[str]) -> dict[str, str]:
    """KEY:SECRET pairs. Raises SettingsInvalid, without printing a secret."""
    keys: dict[str, str] = {}
    for number, pair in enumerate(pairs, 1):
        key, colon, secret = pair.partition(":")
        if not (key and colon and secret):
            raise SettingsInvalid(f"--key number {number}: allowed is KEY:SECRET, neither empty")
        keys[key] = secret
    return keys


def open_tape(args: argparse.Namespace) -> "Tape":
    """The market the flags describe. Raises SettingsInvalid."""
    from service.exchange.span import span

    from_ms, until_ms = span(args.from_time, args.until_time)
    if args.replay:
        from service.exchange.simulated.replay import replay

        return replay(
            Path(args.replay),
            seed=args.seed,
            symbols=args.symbols,
            from_ms=from_ms,
            until_ms=until_ms,
            funding=args.funding,
        )
    from service.exchange.simulated.generator import generate

    tape = generate(args.seed, args.symbols, start_ms=from_ms)
    if until_ms is not None:
        if until_ms <= tape.start_ms:
            raise SettingsInvalid(
                f"--until: found {args.until_time}, allowed is a time after the market's start"
            )
        tape.end_ms = min(tape.end_ms, until_ms)
    return tape


def server_options(args: argparse.Namespace, tape: "Tape", keys: Mapping[str, str]) -> "ServerOptions":
    from service.exchange.simulated.engine import Assumptions
    from service.exchange.simulated.fault_plan import read_fault_file
    from service.exchange.simulated.server import ServerOptions

    return ServerOptions(
        speed=args.speed,
        keys=keys,
        deposit=args.deposit,
        assumptions=Assumptions(
            maker_fee_fraction=args.maker_fee,
            taker_fee_fraction=args.taker_fee,
            spread_bps=args.spread_bps,
            slippage_bps_per_million=args.slippage_bps,
        ),
        latency_ms=args.latency_ms,
        stream_messages_per_s=args.stream_messages,
        state=args.state,
        market=market_name(args, tape),
        faults=read_fault_file(args.faults) if args.faults else None,
    )


def market_name(args: argparse.Namespace, tape: "Tape") -> dict[str, str]:
    """What makes a market the same one after a restart; the end may be moved, the folder too."""
    return {
        "source": f"replay {Path(args.replay).resolve().name}" if args.replay else "seeded",
        "seed": str(args.seed),
        "symbols": str(len(tape.symbols)),
        "start_ms": str(tape.start_ms),
        "listing": hashlib.sha256(",".join(tape.symbols).encode()).hexdigest()[:16],
    }


async def _serve(
    args: argparse.Namespace, tape: "Tape", options: "ServerOptions", listener: socket.socket
) -> int:
    import structlog

    from service.exchange.simulated.server import serving

    log = structlog.get_logger("sim")
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with serving(tape, options, listener) as venue, watching_parent(args.parent, stop):
        log.info(READY, **ready_facts(args.host, venue))
        await stop.wait()
    struck = dict(sorted(options.faults.counts.items())) if options.faults else {}
    log.info(
        "simulated exchange stopped",
        market_ms=venue.clock.now_ms(),
        **venue.streams.statistics(),
        **({"faults": struck} if struck else {}),
    )
    return EXIT_OK


def ready_facts(host: str, venue: "Venue") -> dict[str, Any]:
    """Addresses, clock, and the assumptions every result rests on."""
    shown = f"[{host}]" if ":" in host else host
    assumptions = venue.options.assumptions
    return {
        "rest_url": f"http://{shown}:{venue.port}",
        "stream_url": f"ws://{shown}:{venue.port}",
        "port": venue.port,
        **venue.clock_facts(),
        "market": dict(venue.options.market),
        "maker_fee_fraction": float(assumptions.maker_fee_fraction),
        "taker_fee_fraction": float(assumptions.taker_fee_fraction),
        "spread_bps": float(assumptions.spread_bps),
        "slippage_bps_per_million": float(assumptions.slippage_bps_per_million),
        "latency_ms": venue.options.latency_ms,
    }


@asynccontextmanager
async def watching_parent(wanted: bool, stop: asyncio.Event) -> AsyncIterator[None]:
    """Set `stop` when standard input ends: its other end lives exactly as long as the parent."""
    if not wanted:
        yield
        return
    loop = asyncio.get_running_loop()
    handle = sys.stdin.fileno()

    def read() -> None:
        if not os.read(handle, 4_096):
            loop.remove_reader(handle)
            stop.set()

    loop.add_reader(handle, read)
    try:
        yield
    finally:
        loop.remove_reader(handle)
