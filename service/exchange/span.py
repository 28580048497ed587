"""The span of time of a market that is asked for."""

from service.clock import parse_time
from service.errors import SettingsInvalid


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
