"""The recorded candles that a market replays: whether there are any, before anything is read or written."""

from pathlib import Path

from service.errors import SettingsInvalid
from service.exchange.span import span
from service.settings import SimSettings

SUFFIXES = (".parquet", ".csv")


def check_market(settings: SimSettings) -> None:
    """What can be known of an own market without reading it, before anything is written for it.

    Raises: SettingsInvalid: a time cannot be read, or the directory holds no candles.
    """
    span(settings.from_time, settings.until_time)
    if not settings.replay:
        return
    directory = Path(settings.replay)
    if not directory.is_dir():
        raise SettingsInvalid(
            f"replay directory {directory}: not a directory; give one of <SYMBOL>-<tf> files"
        )
    try:
        found = any(path.suffix in SUFFIXES for path in directory.iterdir())
    except OSError as error:
        raise SettingsInvalid(f"replay directory {directory}: cannot be read: {error.strerror}") from None
    if not found:
        raise SettingsInvalid(
            f"replay directory {directory}: no candle files found; give one of <SYMBOL>-<tf> files, "
            f"{' or '.join(SUFFIXES)}"
        )
