"""Which ends of a position begin a cooldown, and how long it lasts."""

from decimal import Decimal

import msgspec
import pytest

from service.records import CloseReason, RefusalReason
from service.trading.cooldowns import MINUTE_MS, Cooldowns
from tests.samples import POSITION

CLOSED = msgspec.structs.replace(POSITION, quantity=Decimal(0), closed_ms=1_000, close_reason="stop")
HOUR_MS = 60 * MINUTE_MS


@pytest.mark.parametrize("reason", list(CloseReason))
def test_a_stop_liquidation_or_adl_begins_one_and_no_other_end_does(reason):
    begins = reason in ("stop", "liquidation", "adl")
    until_ms = Cooldowns(60.0).until_ms(msgspec.structs.replace(CLOSED, close_reason=reason.value))
    assert until_ms == (1_000 + HOUR_MS if begins else 0)


def test_a_position_that_is_open_begins_none():
    assert Cooldowns(60.0).until_ms(msgspec.structs.replace(CLOSED, closed_ms=0)) == 0


def test_it_lasts_its_minutes_from_the_close_and_not_one_millisecond_longer():
    cooldowns = Cooldowns(0.5)
    cooldowns.begin(CLOSED, 1_000)
    refused = cooldowns.refusal("AUSDT", 1_000 + 30_000 - 1)
    assert refused is not None
    assert refused.reason is RefusalReason.COOLDOWN
    assert cooldowns.refusal("BUSDT", 1_000) is None
    assert cooldowns.refusal("AUSDT", 1_000 + 30_000) is None
    assert cooldowns.left(0) == {}, "what is over is forgotten"


def test_a_refusal_says_how_much_is_left_and_why():
    cooldowns = Cooldowns(60.0)
    cooldowns.begin(CLOSED, 1_000)
    refused = cooldowns.refusal("AUSDT", 1_000 + 15 * MINUTE_MS)
    assert refused is not None
    assert refused.detail.startswith("45.0 minutes left since its position ended by stop, liquidation")


def test_an_older_end_that_is_told_later_shortens_nothing():
    cooldowns = Cooldowns(60.0)
    cooldowns.begin(msgspec.structs.replace(CLOSED, closed_ms=9_000), 9_000)
    cooldowns.begin(CLOSED, 9_000)
    assert cooldowns.left(9_000) == {"AUSDT": 60.0}


def test_what_ended_long_ago_begins_none():
    cooldowns = Cooldowns(60.0)
    cooldowns.begin(CLOSED, 2 * HOUR_MS)
    assert cooldowns.left(0) == {}


def test_zero_minutes_begin_none_and_ignore_those_that_are_kept():
    cooldowns = Cooldowns(0.0)
    cooldowns.restore({"AUSDT": HOUR_MS}, 0)
    cooldowns.begin(CLOSED, 1_000)
    assert cooldowns.left(0) == {}
