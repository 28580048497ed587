"""The venue's refusals as our errors. What a code means stands in `service.reactions`; here its class."""

import re
from collections.abc import Mapping
from enum import Enum

import msgspec

from service.errors import (
    OrderOutcomeUnknown,
    OrderRejected,
    RequestRejected,
    VenueClockSkew,
    VenueCredentials,
    VenueError,
    VenueMalformed,
    VenueRestricted,
    VenueThrottled,
    VenueUnavailable,
)
from service.reactions import REACTIONS, Reaction

DEFAULT_SILENCE_MS = 60_000


class Kind(Enum):
    """What a request does, which decides what a lost answer means."""

    READ = "read"  # repeated freely
    WRITE = "write"  # sets something; repeating it is harmless, but left to the caller
    ORDER = "order"  # a lost answer leaves the outcome unknown; never repeated here


class Refusal(msgspec.Struct, frozen=True):
    """The body of a refused request."""

    code: int = 0
    msg: str = ""


STATUS_REACTIONS: dict[int, Reaction] = {
    401: Reaction.CREDENTIALS,
    408: Reaction.UNKNOWN,
}
"""Consulted where the body carries no code. 5xx leave the outcome unknown."""

_refusal = msgspec.json.Decoder(Refusal)
_banned_until = re.compile(r"until (\d{12,14})")


def error_for(
    status: int, body: bytes, headers: Mapping[str, str], *, endpoint: str, kind: Kind, now_ms: int
) -> VenueError:
    """The error that an answer stands for. Names the endpoint, never keys or a signature."""
    if status in (403, 451):
        return VenueRestricted(
            f"{endpoint}: HTTP {status}: the venue does not serve this address; run from a permitted place",
            status=status,
        )
    refusal = refusal_of(body)
    code, text = refusal.code, refusal.msg or body[:120].decode("utf-8", "replace")
    reaction = _reaction(status, code, text)
    message = f"{endpoint}: HTTP {status}, code {code}: {text}"
    if reaction is Reaction.THROTTLED:
        retry_at_ms = retry_time_ms(headers, text, now_ms)
        return VenueThrottled(message, retry_at_ms=retry_at_ms, code=code, status=status)
    if reaction is Reaction.CLOCK:
        return VenueClockSkew(message, code=code, status=status)
    if reaction is Reaction.CREDENTIALS:
        return VenueCredentials(message, code=code, status=status)
    if reaction is Reaction.NOT_DONE or (reaction is Reaction.UNKNOWN and kind is not Kind.ORDER):
        return VenueUnavailable(message, code=code, status=status)
    if reaction is Reaction.UNKNOWN:
        return OrderOutcomeUnknown(message, code=code, status=status)
    if code == 0 and kind is Kind.ORDER:  # not the venue's own words: a proxy's page proves nothing
        return OrderOutcomeUnknown(message, status=status)
    if code == 0 and status < 400:
        return VenueMalformed(message, status=status)
    refused = OrderRejected if kind is Kind.ORDER else RequestRejected
    return refused(message, code=code, status=status)


def refusal_of(body: bytes) -> Refusal:
    """Code and text of a refusal; zero and empty where the body is not the venue's."""
    try:
        return _refusal.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return Refusal()


def _reaction(status: int, code: int, text: str) -> Reaction | None:
    if code in REACTIONS:
        return REACTIONS[code]
    if status in (418, 429):
        return Reaction.THROTTLED
    if status == 503 and text.strip().lower().startswith("service unavailable"):
        return Reaction.NOT_DONE  # the venue's words for "failed"; its "Unknown error" means unknown
    if status >= 500:
        return Reaction.UNKNOWN
    return STATUS_REACTIONS.get(status) if code == 0 else None


def retry_time_ms(headers: Mapping[str, str], text: str, now_ms: int) -> int:
    """When to speak again: the Retry-After header, else the ban's end in the text, else a minute."""
    seconds = headers.get("Retry-After", "")
    if seconds.isdigit():
        return now_ms + int(seconds) * 1000
    if found := _banned_until.search(text):
        return int(found.group(1))
    return now_ms + DEFAULT_SILENCE_MS
