import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.learning.encoding import LIMIT, encode

NAMES = ("a", "b")
numbers = st.floats(allow_nan=True, allow_infinity=True)


@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=20))
def test_serving_one_signal_gives_the_row_that_training_sees(rows):
    columns = {name: np.array([row[n] for row in rows]) for n, name in enumerate(NAMES)}
    trained = encode(columns, NAMES)
    served = np.concatenate([encode({"b": b, "a": a}, NAMES) for a, b in rows])
    np.testing.assert_array_equal(trained, served)
    assert trained.dtype == np.float32


def test_what_is_not_finite_is_missing_and_what_is_huge_is_bounded():
    encoded = encode({"a": np.array([np.inf, np.nan, 1e300, -1e300]), "b": np.zeros(4)}, NAMES)
    np.testing.assert_array_equal(encoded[:, 0], np.array([np.nan, np.nan, LIMIT, -LIMIT], dtype=np.float32))


def test_a_missing_feature_is_an_error_and_never_a_zero():
    with pytest.raises(KeyError):
        encode({"a": 1.0}, NAMES)
