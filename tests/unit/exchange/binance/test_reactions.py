"""Each code of the table, row by row: the error that the adapter raises, and what the caller is to do."""

import json

import pytest

from service.errors import (
    OrderOutcomeUnknown,
    OrderRejected,
    VenueClockSkew,
    VenueCredentials,
    VenueError,
    VenueThrottled,
    VenueUnavailable,
)
from service.exchange.binance.errors import Kind, error_for
from service.reactions import REACTIONS, Reaction, reaction_to

ROWS: dict[Reaction, tuple[type[VenueError], tuple[int, ...]]] = {
    Reaction.UNKNOWN: (OrderOutcomeUnknown, (-1000, -1001, -1006, -1007, -4116)),
    Reaction.NOT_DONE: (VenueUnavailable, (-1008,)),
    Reaction.THROTTLED: (VenueThrottled, (-1003, -1015)),
    Reaction.CLOCK: (VenueClockSkew, (-1021, -5028)),
    Reaction.CREDENTIALS: (VenueCredentials, (-1002, -1022, -2014, -2015)),
    Reaction.REFUSED: (OrderRejected, (-1125, -2010, -5021, -5022, -5047)),
    Reaction.SKIP: (OrderRejected, (-2019, -2027, -2028, -4028, -4161)),
    Reaction.REFRESH_RULES: (OrderRejected, (-1111, -4003, -4004, -4005, -4014, -4023, -4164)),
    Reaction.LOOK_FOR_ORDER: (OrderRejected, (-2011, -2013)),
    Reaction.LOOK_AT_POSITION: (OrderRejected, (-2022, -4118, -4509)),
    Reaction.LOOK_FOR_STOP: (OrderRejected, (-4130,)),
    Reaction.CLOSE_NOW: (OrderRejected, (-2021, -4142)),
    Reaction.LIMIT_INSTEAD: (OrderRejected, (-4131,)),
    Reaction.MAKE_ROOM: (OrderRejected, (-2025, -4045)),
    Reaction.STOP_OPENING: (OrderRejected, (-4105, -4106, -4107, -4189, -4400, -4401)),
    Reaction.WRONG_MODE: (OrderRejected, (-4061,)),
    Reaction.WRONG_ROUTE: (OrderRejected, (-4120,)),
    Reaction.DONE: (OrderRejected, (-4046, -4059, -4171, -5027)),
    Reaction.CANNOT_CHANGE: (OrderRejected, (-4047, -4048, -4067, -4068, -4531)),
}


@pytest.mark.parametrize(
    ("code", "reaction", "error"),
    [(code, reaction, error) for reaction, (error, codes) in ROWS.items() for code in codes],
)
def test_a_code_asks_for_its_reaction(code: int, reaction: Reaction, error: type[VenueError]):
    body = json.dumps({"code": code, "msg": "no"}).encode()
    met = error_for(400, body, {}, endpoint="POST /x", kind=Kind.ORDER, now_ms=0)
    assert type(met) is error
    assert met.reaction is reaction


def test_every_row_of_the_table_is_tested_and_a_code_outside_it_is_a_refusal():
    assert {code for _, codes in ROWS.values() for code in codes} == set(REACTIONS)
    assert set(ROWS) == set(Reaction)
    assert reaction_to(-9999) is reaction_to(0) is Reaction.REFUSED
