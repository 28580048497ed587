"""What a person asks of the kill switch where another perpd holds the lease: left in the store for it.

The holder alone writes the switch. It takes a request up within seconds, or at its next start, once, and a
request never lowers a level: it may be older than what the holder was told meanwhile.
"""

import msgspec

from service.trading.killswitch import Level, Switch, tripped

REQUEST = "kill_request"
"""The value's name in the store; it is written without the lease."""


class KillRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A level, who wants it and why. `at_ms` tells two requests of the same words apart."""

    level: Level
    reason: str
    by: str
    at_ms: int


def encoded_request(level: Level, reason: str, by: str, at_ms: int) -> str:
    return msgspec.json.encode(KillRequest(level=level, reason=reason, by=by, at_ms=at_ms)).decode()


def with_request(switch: Switch, text: str, now_ms: int) -> Switch:
    """The switch once it has taken up what the store holds; "" asks nothing. Unreadable, it is tripped."""
    if not text or text == switch.asked:
        return switch
    try:
        request = msgspec.json.decode(text, type=KillRequest)
    except msgspec.MsgspecError as error:
        unreadable = f"a request cannot be read: {error}"
        request = KillRequest(level=Level.NO_ENTRIES, reason=unreadable, by="store", at_ms=now_ms)
    switch = tripped(switch, request.level, request.reason, request.by, now_ms)
    return msgspec.structs.replace(switch, asked=text)
