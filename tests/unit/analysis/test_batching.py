"""Adaptive batch sizes."""

import pytest

from service.analysis.batching import batch_size, in_batches
from service.records import Load


@pytest.mark.parametrize(
    ("memory", "cpu", "expected"),
    [
        (0.10, 0.10, 8),
        (0.499, 0.399, 8),
        (0.50, 0.10, 6),
        (0.10, 0.40, 6),
        (0.649, 0.599, 6),
        (0.65, 0.10, 4),
        (0.10, 0.60, 4),
        (1.0, 1.0, 4),
    ],
)
def test_a_batch_follows_memory_and_cpu_as_the_founding_report_has_it(memory, cpu, expected):
    assert batch_size(2, Load(memory, cpu)) == expected


def test_the_older_factors_are_a_matter_of_settings():
    factors = (3.0, 2.0, 1.0)
    sizes = [batch_size(4, Load(m, 0.0), factors) for m in (0.1, 0.6, 0.9)]
    assert sizes == [24, 16, 8]


def test_a_batch_is_never_empty():
    assert batch_size(0, Load(1.0, 1.0), (0.1, 0.1, 0.1)) == 1


def test_batches_keep_the_order_and_lose_nothing():
    assert in_batches([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4], [5]]
    assert in_batches([], 3) == []
