"""The candle file that the books were made with, and no other.

The file's header stays in the file: it must change with the bytes beside it. The store keeps what it said at
the last start and at the last orderly end. A file that says something else, since it came from another market
or machine or was put back from an older copy, is set aside, and its candles are fetched again.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import structlog

from service.errors import DataDirectoryUnusable, LeaseLost
from service.market.candles import CandleFileInvalid, CandleStore, Header, boot_id, read_header
from service.ports import StateStore

log = structlog.get_logger("market.candles")

KEPT = "candles.header"


@asynccontextmanager
async def opened_candles(
    path: Path, store: StateStore, *, symbols_capacity: int, candles: int
) -> AsyncIterator[CandleStore]:
    """The candle store at the path, as `CandleStore.open` opens it, once the books know its file.

    Raises: DataDirectoryUnusable and its kin, LeaseLost: the file or the store cannot be written.
    """
    kept = decoded(await store.get_value(KEPT))
    opened = CandleStore.open(
        path, symbols_capacity=symbols_capacity, candles=candles, doubt=_doubt_about(path, kept)
    )
    try:
        await store.set_value(KEPT, encoded(opened.header))
        yield opened
    finally:
        last = opened.header
        opened.close()
        await _note(store, last)


async def _note(store: StateStore, header: Header) -> None:
    """At the end. A store that takes nothing has what the start wrote, which a later file is believed by."""
    try:
        await store.set_value(KEPT, encoded(header))
    except (DataDirectoryUnusable, LeaseLost) as error:
        log.debug("the store does not know how the candle file was left", reason=str(error))


def _doubt_about(path: Path, kept: Header | None) -> str:
    if kept is None:
        return ""
    try:
        found = read_header(path)
    except CandleFileInvalid:
        return ""  # opening it says so
    return "" if found is None else doubt(found, kept, boot_id())


def doubt(found: Header, kept: Header, boot: str) -> str:
    """Why a file is not the one that the books were made with, in words; "" when it is. Pure.

    It may be newer than the books: after a crash, or with books put back from a backup. Then what was last
    done to it was done here, in the boot that the books know of or in this one.
    Args: kept: as the last run left it, or found it when it did not end in order; boot: id of this boot.
    """
    known = "candles are fetched again, since it is not the file that the books were made with: "
    if (found.mark, sizes(found)) != (kept.mark, sizes(kept)):
        return f"{known}another one ({sizes(found)}, the books had {sizes(kept)})"
    if found.generation < kept.generation:
        return f"{known}an older copy (generation {found.generation}, the books had {kept.generation})"
    if found.boot not in (kept.boot, boot):
        return f"{known}used on another machine since, or without these books"
    return ""


def sizes(header: Header) -> str:
    return f"{header.capacity} symbols x {'/'.join(header.timeframes)} x {header.candles} candles"


def encoded(header: Header) -> str:
    return msgspec.json.encode(header).decode()


def decoded(text: str | None) -> Header | None:
    """None at the first start; what cannot be read is no reason to doubt the file."""
    if text is None:
        return None
    try:
        return msgspec.json.decode(text, type=Header)
    except msgspec.MsgspecError as error:
        log.warning("what the store knows of the candle file cannot be read", error=str(error))
        return None
