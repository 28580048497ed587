import itertools

from service.records import RefusalReason
from service.trading.ranking import rank_signals
from tests.samples import signal


def test_the_best_are_first_and_ties_go_by_id_whatever_the_arrival():
    signals = [signal("c", confidence=0.6), signal("a", confidence=0.6), signal("b", confidence=0.9)]
    for arrival in itertools.permutations(signals):
        ranked = rank_signals(arrival, max_signals=2)
        assert [(r.rank, r.signal.signal_id) for r in ranked] == [(1, "b"), (2, "a"), (3, "c")]


def test_what_is_below_the_candidates_is_refused_with_rank_and_limit():
    ranked = rank_signals([signal(str(n), confidence=n / 10) for n in range(5)], max_signals=3)
    refused = [r.refused for r in ranked]
    assert refused[:3] == [None, None, None]
    assert all(r is not None and r.reason is RefusalReason.NOT_IN_TOP for r in refused[3:])
    assert "4" in refused[3].detail
    assert "3" in refused[3].detail


def test_one_candidate_leaves_the_others_refused():
    ranked = rank_signals([signal(str(n), confidence=0.5) for n in range(5)], max_signals=1)
    assert sum(r.refused is None for r in ranked) == 1
