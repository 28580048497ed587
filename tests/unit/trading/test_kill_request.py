"""A request that was left beside the lease: taken up once, never lowering a level."""

import pytest

from service.trading.kill_request import encoded_request, with_request
from service.trading.killswitch import Level, Rule, Switch, resumed, tripped

FLATTEN = encoded_request(Level.FLATTEN, "news", "perpd, me", 5)


def test_nothing_asked_changes_nothing():
    assert with_request(Switch(), "", 9) == Switch()


def test_a_request_trips_it_by_hand_and_is_taken_up_once():
    switch = with_request(Switch(), FLATTEN, 9)
    [trip] = switch.trips
    assert (trip.rule, trip.level, trip.by, trip.tripped_ms) == (Rule.BY_HAND, Level.FLATTEN, "perpd, me", 9)
    assert "news" in trip.words
    assert with_request(switch, FLATTEN, 10) == switch


def test_what_was_resumed_since_is_not_asked_for_again():
    switch = resumed(with_request(Switch(), FLATTEN, 9), "over", "me", 10)
    assert with_request(switch, FLATTEN, 11).trips == ()
    again = encoded_request(Level.FLATTEN, "news", "perpd, me", 12)
    assert with_request(switch, again, 12).level is Level.FLATTEN


@pytest.mark.parametrize("asked", list(Level))
@pytest.mark.parametrize("known", list(Level))
def test_it_never_lowers_a_level(known: Level, asked: Level):
    before = tripped(Switch(), known, "", "me", 1)
    after = with_request(before, encoded_request(asked, "", "you", 2), 2)
    assert after.level is not None
    assert after.level.severity == max(known.severity, asked.severity)
    assert (after.trips == before.trips) is (asked.severity <= known.severity)


def test_one_that_cannot_be_read_stops_entries_once():
    switch = with_request(Switch(), "{broken", 9)
    assert switch.level is Level.NO_ENTRIES
    assert with_request(resumed(switch, "seen", "me", 10), "{broken", 11).trips == ()
