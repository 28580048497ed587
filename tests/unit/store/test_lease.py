"""The lease as its holder sees it: a time limit that renewals move, and a loss that is final."""

import pytest

from service.store.lease import LocalLease, TimedLease


class Time:
    now_s = 1_000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def time() -> Time:
    return Time()


def test_a_holder_stops_sending_after_two_thirds_of_an_unrenewed_lease(time):
    lease = TimedLease(4, 30.0, asked_s=time.now_s, now_s=time)
    time.now_s += 19.9
    assert lease.may_send() == ""
    time.now_s += 0.2
    assert "could not be renewed" in lease.may_send()


def test_a_renewal_counts_from_when_it_was_asked_for_and_brings_a_lapsed_lease_back(time):
    lease = TimedLease(4, 30.0, asked_s=time.now_s, now_s=time)
    time.now_s += 25.0
    assert lease.may_send()
    lease.renewed(asked_s=time.now_s - 10.0)
    assert lease.may_send() == ""
    time.now_s += 10.1
    assert lease.may_send()


def test_a_lease_that_was_taken_over_never_comes_back(time):
    lease = TimedLease(4, 30.0, asked_s=time.now_s, now_s=time)
    lease.lose("b took the lease over")
    lease.renewed(asked_s=time.now_s)
    lease.lose("another reason")
    assert lease.may_send() == "b took the lease over"


def test_a_local_lease_is_held_to_the_end():
    assert LocalLease(1).may_send() == ""
