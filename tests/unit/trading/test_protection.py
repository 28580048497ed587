import pytest

from service.trading.protection import (
    Failure,
    Step,
    next_stop_step,
    next_target_step,
    other_working_type,
    stop_breached,
)


def failures(*codes: int) -> list[Failure]:
    return [Failure(code=code, detail="") for code in codes]


@pytest.mark.parametrize(
    ("codes", "step"),
    [
        ((), Step.PLACE),
        ((0,), Step.PLACE),
        ((0, -1008), Step.PLACE_OTHER_WORKING_TYPE),
        ((-2010,), Step.PLACE),
        ((-2010, -2010), Step.PLACE_OTHER_WORKING_TYPE),
        ((-2010, -2010, -2010), Step.PLACE_REDUCE_ONLY),
        ((-2010, -2010, -2010, -2010), Step.WATCH),
        ((-2010,) * 9, Step.WATCH),
        ((-2021,), Step.CLOSE),
        ((-4142,), Step.CLOSE),
        ((-2010, -2021), Step.CLOSE),
        ((-2025,), Step.ASK),
        ((-4045,), Step.ASK),
        ((-4130,), Step.ASK),
        ((-4116,), Step.ASK),
        ((-4509,), Step.ASK),
        ((-4130, 0), Step.PLACE_OTHER_WORKING_TYPE),
    ],
)
def test_the_ladder_of_a_stop(codes, step):
    assert next_stop_step(failures(*codes), unprotected_s=1, limit_s=15) is step


def test_time_that_is_up_closes_after_the_next_failure():
    assert next_stop_step(failures(-2010), unprotected_s=15, limit_s=15) is Step.CLOSE
    assert next_stop_step([], unprotected_s=15, limit_s=15) is Step.PLACE


@pytest.mark.parametrize(
    ("codes", "step"),
    [((), Step.PLACE), ((-1,), Step.PLACE), ((-1, -1), Step.GIVE_UP), ((-2021,), Step.CLOSE)],
)
def test_the_ladder_of_a_target(codes, step):
    assert next_target_step(failures(*codes)) is step


def test_the_other_working_type_is_the_other():
    assert other_working_type("MARK_PRICE") == "CONTRACT_PRICE"
    assert other_working_type("CONTRACT_PRICE") == "MARK_PRICE"


@pytest.mark.parametrize(
    ("price", "sign", "breached"),
    [
        (99.0, 1, True),
        (98.0, 1, True),
        (99.5, 1, False),
        (99.0, -1, True),
        (98.0, -1, False),
        (101.0, -1, True),
    ],
)
def test_the_software_stop_sees_when_the_price_is_there(price, sign, breached):
    assert stop_breached(99.0, price, sign) is breached
