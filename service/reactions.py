"""What is to be done about each of the venue's error codes: one table.

The venue adapter reads from it what an answer means (was it done, refused, or is that unknown), and
trading what to do next. Source: the venue's error-code page and change log as of November 2026.
"""

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType


class Reaction(StrEnum):
    """What the caller should do. The first group says whether the request was done at all."""

    UNKNOWN = "unknown"  # may have been done: ask by client id before anything else on the symbol
    NOT_DONE = "not_done"  # nothing was done: again, later
    THROTTLED = "throttled"  # nothing was done: silence until the time that the venue names
    CLOCK = "clock"  # nothing was done: measure the venue's time, sign again, once
    CREDENTIALS = "credentials"  # key, permission, address or signature: no entries until a person looks

    REFUSED = "refused"  # the venue said no: record its words, do not retry
    SKIP = "skip"  # not at this size or moment: leave the signal, no retry
    REFRESH_RULES = "refresh_rules"  # off the venue's grid: read its rules anew, fit the order, once more
    LOOK_FOR_ORDER = "look_for_order"  # it does not know the order: ask; on a cancel it is done already
    LOOK_AT_POSITION = "look_at_position"  # nothing to reduce or guard: ask for position and orders
    LOOK_FOR_STOP = "look_for_stop"  # a closing order of this direction rests: see whose it is
    CLOSE_NOW = "close_now"  # the price is beyond the stop (or target) already: close at market
    LIMIT_INSTEAD = "limit_instead"  # no market order at these prices: the same as a limit order
    MAKE_ROOM = "make_room"  # too many orders rest: sweep those of ended positions, then again
    STOP_OPENING = "stop_opening"  # the venue lets this account or symbol only reduce: no entries for a while
    WRONG_MODE = "wrong_mode"  # the account is set up differently: no entries until a person looks
    WRONG_ROUTE = "wrong_route"  # perpd spoke to the wrong endpoint: a fault of perpd, alarm
    DONE = "done"  # it is so already: success
    CANNOT_CHANGE = "cannot_change"  # not while something is open there: say so and go on


REACTIONS: Mapping[int, Reaction] = MappingProxyType(
    {
        -1000: Reaction.UNKNOWN,  # unknown error while processing
        -1001: Reaction.UNKNOWN,  # internal disconnect
        -1002: Reaction.CREDENTIALS,  # not authorised
        -1003: Reaction.THROTTLED,  # request weight; the end of a ban stands in its text
        -1006: Reaction.UNKNOWN,  # unexpected response from the message bus
        -1007: Reaction.UNKNOWN,  # time-out at the backend
        -1008: Reaction.NOT_DONE,  # system-level protection; closing orders are exempt
        -1015: Reaction.THROTTLED,  # order count of the window
        -1021: Reaction.CLOCK,  # timestamp outside the receive window
        -1022: Reaction.CREDENTIALS,  # signature
        -1111: Reaction.REFRESH_RULES,  # precision
        -1125: Reaction.REFUSED,  # the listen key is gone: its keeper makes another at any refusal
        -2010: Reaction.REFUSED,  # generic
        -2011: Reaction.LOOK_FOR_ORDER,  # cancel of an unknown order
        -2013: Reaction.LOOK_FOR_ORDER,  # no such order; proves nothing right after a time-out
        -2014: Reaction.CREDENTIALS,  # key format
        -2015: Reaction.CREDENTIALS,  # key, address or permission
        -2019: Reaction.SKIP,  # margin
        -2021: Reaction.CLOSE_NOW,  # would trigger at once
        -2022: Reaction.LOOK_AT_POSITION,  # reduce-only rejected
        -2025: Reaction.MAKE_ROOM,  # open orders
        -2027: Reaction.SKIP,  # beyond the bracket at this leverage
        -2028: Reaction.SKIP,  # leverage too small for the margin
        -4003: Reaction.REFRESH_RULES,  # quantity; usually rounded to zero
        -4004: Reaction.REFRESH_RULES,  # least quantity
        -4005: Reaction.REFRESH_RULES,  # greatest quantity
        -4014: Reaction.REFRESH_RULES,  # tick
        -4023: Reaction.REFRESH_RULES,  # step
        -4028: Reaction.SKIP,  # leverage not valid
        -4045: Reaction.MAKE_ROOM,  # conditional orders, 200 over all symbols
        -4046: Reaction.DONE,  # margin type
        -4047: Reaction.CANNOT_CHANGE,  # margin type with open orders
        -4048: Reaction.CANNOT_CHANGE,  # margin type with a position
        -4059: Reaction.DONE,  # position side
        -4061: Reaction.WRONG_MODE,  # hedge mode
        -4067: Reaction.CANNOT_CHANGE,  # position side with open orders
        -4068: Reaction.CANNOT_CHANGE,  # position side with a position
        -4105: Reaction.STOP_OPENING,  # reduce-only mode
        -4106: Reaction.STOP_OPENING,
        -4107: Reaction.STOP_OPENING,
        -4116: Reaction.UNKNOWN,  # duplicate client id: an earlier send of it landed
        -4118: Reaction.LOOK_AT_POSITION,  # other reduce-only orders consume the position
        -4120: Reaction.WRONG_ROUTE,  # a conditional order at the plain endpoint
        -4130: Reaction.LOOK_FOR_STOP,  # a closing order of this direction rests
        -4131: Reaction.LIMIT_INSTEAD,  # PERCENT_PRICE of the counterparty's best price
        -4142: Reaction.CLOSE_NOW,  # would trigger at once
        -4161: Reaction.SKIP,  # leverage cannot fall with a position in isolated margin
        -4164: Reaction.REFRESH_RULES,  # notional
        -4171: Reaction.DONE,  # assets mode
        -4189: Reaction.STOP_OPENING,  # reduce-only mode
        -4400: Reaction.STOP_OPENING,  # quantitative rules
        -4401: Reaction.STOP_OPENING,
        -4509: Reaction.LOOK_AT_POSITION,  # GTE without a position
        -4531: Reaction.CANNOT_CHANGE,
        -5021: Reaction.REFUSED,  # fill-or-kill, as asked for
        -5022: Reaction.REFUSED,  # post-only, as asked for
        -5027: Reaction.DONE,  # a change that changes nothing
        -5028: Reaction.CLOCK,  # timestamp, checked again at the matching engine
        -5047: Reaction.REFUSED,  # a change that contradicts reduce-only
    }
)


def reaction_to(code: int) -> Reaction:
    """The reaction to a code; a code that is not in the table is a refusal."""
    return REACTIONS.get(code, Reaction.REFUSED)
