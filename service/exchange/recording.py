"""What of a market is asked for: its span of time, and the recorded candles it replays."""

from pathlib import Path

from service.clock import parse_time
from service.errors import SettingsInvalid
from service.settings import SimSettings

SUFFIXES = (".parquet", ".csv")


def span(from_time: str, until_time: str) -> tuple[int | None, int | None]:
    """First and last moment in ms; None where it is not said. Raises SettingsInvalid."""
    from_ms, until_ms = _moment("--from", from_time), _moment("--until", until_time)
    if from_ms is not None and until_ms is not None and until_ms <= from_ms:
        raise SettingsInvalid(f"--until: found {until_time}, allowed is a time after --from")
    return from_ms, until_ms


def _moment(flag: str, text: str) -> int | None:
    try:
        return parse_time(text) if text else None
    except ValueError as error:
        raise SettingsInvalid(f"{flag}: {error}") from None


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
    if not any(path.suffix in SUFFIXES for path in directory.iterdir()):
        raise SettingsInvalid(
            f"replay directory {directory}: no candle files found; give one of <SYMBOL>-<tf> files, "
            f"{' or '.join(SUFFIXES)}"
        )
