import pytest

from service.trading.protection import (
    Failure,
    Step,
    next_stop_step,
    next_target_step,
    other_working_type,
)


def failures(*codes: int) -> list[Failure]:
    return [Failure(code=code, detail="") for code in codes]


@pytest.mark.parametrize(
    ("codes", "step"),
    [
        ((), Step.PLACE),
        ((-1001,), Step.PLACE),
        ((-1001, -1001), Step.PLACE_OTHER_WORKING_TYPE),
        ((-1001, -1001, -1001), Step.CLOSE),
        ((-2021,), Step.CLOSE),
        ((-1001, -2021), Step.CLOSE),
        ((-4130,), Step.ASK),
        ((-4116,), Step.ASK),
        ((-4509,), Step.ASK),
        ((-4130, 0), Step.PLACE_OTHER_WORKING_TYPE),
    ],
)
def test_the_ladder_of_a_stop(codes, step):
    assert next_stop_step(failures(*codes), unprotected_s=1, limit_s=15) is step


def test_time_that_is_up_closes_after_the_next_failure():
    assert next_stop_step(failures(-1001), unprotected_s=15, limit_s=15) is Step.CLOSE
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
