"""The table of refusals: what each code, status and body asks of the caller."""

import json

import pytest

from service.errors import (
    OrderOutcomeUnknown,
    OrderRejected,
    RequestRejected,
    VenueClockSkew,
    VenueCredentials,
    VenueError,
    VenueRestricted,
    VenueThrottled,
    VenueUnavailable,
)
from service.exchange.binance.errors import Kind, error_for

NOW_MS = 1_700_000_000_000


def met(
    status: int,
    code: int = 0,
    text: str = "no",
    kind: Kind = Kind.ORDER,
    headers: dict[str, str] | None = None,
) -> VenueError:
    body = json.dumps({"code": code, "msg": text}).encode() if code else text.encode()
    return error_for(status, body, headers or {}, endpoint="POST /x", kind=kind, now_ms=NOW_MS)


@pytest.mark.parametrize(
    ("status", "code", "order_error", "read_error"),
    [
        (400, -1000, OrderOutcomeUnknown, VenueUnavailable),
        (400, -1003, VenueThrottled, VenueThrottled),
        (400, -1006, OrderOutcomeUnknown, VenueUnavailable),
        (400, -1007, OrderOutcomeUnknown, VenueUnavailable),
        (408, -1007, OrderOutcomeUnknown, VenueUnavailable),
        (503, -1008, VenueUnavailable, VenueUnavailable),
        (400, -1015, VenueThrottled, VenueThrottled),
        (400, -1021, VenueClockSkew, VenueClockSkew),
        (400, -5028, VenueClockSkew, VenueClockSkew),
        (400, -1022, VenueCredentials, VenueCredentials),
        (401, -2014, VenueCredentials, VenueCredentials),
        (401, -2015, VenueCredentials, VenueCredentials),
        (400, -2010, OrderRejected, RequestRejected),
        (400, -2013, OrderRejected, RequestRejected),
        (400, -2019, OrderRejected, RequestRejected),
        (400, -2021, OrderRejected, RequestRejected),
        (400, -4116, OrderOutcomeUnknown, VenueUnavailable),
        (400, -4120, OrderRejected, RequestRejected),
        (400, -4164, OrderRejected, RequestRejected),
        (400, -9999, OrderRejected, RequestRejected),
        (418, 0, VenueThrottled, VenueThrottled),
        (429, 0, VenueThrottled, VenueThrottled),
        (451, 0, VenueRestricted, VenueRestricted),
        (403, 0, VenueRestricted, VenueRestricted),
        (500, 0, OrderOutcomeUnknown, VenueUnavailable),
        (502, 0, OrderOutcomeUnknown, VenueUnavailable),
        (504, 0, OrderOutcomeUnknown, VenueUnavailable),
        (404, 0, OrderOutcomeUnknown, RequestRejected),
    ],
)
def test_each_refusal_becomes_the_error_that_says_what_to_do(
    status: int, code: int, order_error: type[VenueError], read_error: type[VenueError]
):
    assert type(met(status, code)) is order_error
    assert type(met(status, code, kind=Kind.READ)) is read_error
    assert met(status, code).code == code


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("Unknown error, please check your request or try again later.", OrderOutcomeUnknown),
        ("Service Unavailable.", VenueUnavailable),
        ("upstream connect error", OrderOutcomeUnknown),
    ],
)
def test_the_bodies_of_503_tell_failed_from_unknown(text: str, error: type[VenueError]):
    assert type(met(503, text=text)) is error


@pytest.mark.parametrize(
    ("headers", "text", "retry_at_ms"),
    [
        ({"Retry-After": "7"}, "no", NOW_MS + 7_000),
        ({}, "Way too many requests; IP banned until 1700000123456.", 1_700_000_123_456),
        ({}, "Too many requests", NOW_MS + 60_000),
        ({"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}, "no", NOW_MS + 60_000),
    ],
)
def test_a_throttled_request_says_when_to_speak_again(headers: dict[str, str], text: str, retry_at_ms: int):
    error = met(418, -1003, text, headers=headers)
    assert isinstance(error, VenueThrottled)
    assert error.retry_at_ms == retry_at_ms
