"""Advice names what was measured, the limit it exceeds, and the setting to change."""

import msgspec
import pytest

from service.monitor.advice import CACHE_REMEDIES, Facts, advise, cycle_shares
from service.monitor.performance import CacheUse, Percentiles
from service.settings import section_types

SETTINGS = {f"{name}.{key}" for name, record in section_types().items() for key in record.__struct_fields__}


def seconds(value: float) -> Percentiles:
    return Percentiles(count=100, mean=value, p50=value, p95=value, p99=value, last=value)


def facts(**changes: object) -> Facts:
    calm = Facts(
        recent={
            "cycle": seconds(0.1),
            "analysis": seconds(0.062),
            "cycle.decisions": seconds(0.02),
            "archive.flush": seconds(0.01),
            "garbage": seconds(0.0005),
        },
        interval_s=60.0,
        window_s=600.0,
        cycles=100,
        workers=2,
        cores=4.0,
    )
    return msgspec.structs.replace(calm, **changes)


SLOW = {"cycle": seconds(40.0), "analysis": seconds(24.8), "cycle.decisions": seconds(10.0)}


def test_a_calm_daemon_gets_no_advice() -> None:
    assert advise(facts()) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"recent": SLOW},
            [
                "analysis takes 62% of a cycle",
                "67% of its interval of 60 s",
                "limit 50%",
                "raise analysis.workers (now 2 of 4 cores) or lower market.symbols",
            ],
        ),
        ({"recent": SLOW, "cores": 2.0}, ["lower market.symbols or market.candles"]),
        (
            {"recent": {"cycle": seconds(40.0), "cycle.decisions": seconds(38.0)}},
            ["decisions takes 95%", "trading.top_signals"],
        ),
        (
            {"recent": {"cycle": seconds(40.0), "cycle.shadows": seconds(38.0)}},
            ["shadows takes 95%", "trading.max_shadows"],
        ),
        ({"missed": 5}, ["5 of 105 cycles in the last 10 min", "limit 1%", "cycle.interval_s"]),
        (
            {"recent": {"archive.flush": seconds(0.25)}},
            ["a write to the archive takes 250 ms", "limit 100 ms", "run.data_dir", "archive.buffer_records"],
        ),
        (
            {"lag_p99_ms": 31.5, "held": ["trading/shadow.py:70 ShadowBook.update"]},
            ["31.5 ms late at p99", "limit 20 ms", "last at trading/shadow.py:70 ShadowBook.update"],
        ),
        ({"lag_p99_ms": 31.5, "workers": 0}, ["analysis.workers = 0", "raise analysis.workers"]),
        ({"lag_alarms": 3}, ["held beyond monitor.lag_alarm_ms (100 ms) 18 times an hour", "limit 6"]),
        ({"recent": {"garbage": seconds(0.0024)}}, ["2.4 ms a cycle", "limit 1 ms", "cycle.collect_garbage"]),
        ({"workers_replaced": 4}, ["24 times an hour", "limit 6", "analysis.worker_memory_limit_mb"]),
    ],
)
def test_each_reason_is_told_with_value_limit_and_setting(
    changes: dict[str, object], words: list[str]
) -> None:
    [advice] = advise(facts(**changes))
    for word in words:
        assert word in advice.text
    assert advice.setting in SETTINGS
    assert advice.measured > advice.limit


def test_a_cache_that_seldom_hits_is_told_once_it_was_asked_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CACHE_REMEDIES, "some", lambda _: ("market.candles", "raise it"))
    assert advise(facts(caches={"some": CacheUse(hits=9, misses=90)})) == []
    [advice] = advise(facts(caches={"some": CacheUse(hits=20, misses=180), "other": CacheUse(0, 500)}))
    assert (
        "the cache of some had 10% of 200 lookups in the last 10 min (limit 40%, possible 80%)" in advice.text
    )
    slow = {"interval_s": 1.0, "speed": 300.0, "caches": {"some": CacheUse(hits=0, misses=180)}}
    assert advise(facts(**slow)) == [], "each cycle has new candles: nothing can be found again"


@pytest.mark.parametrize(
    ("changes", "setting", "words"),
    [
        (
            {"features_ttl_s": 120.0},
            "features.ttl_s",
            "raise features.ttl_s (now 120 s) to a 5m candle's 300 s",
        ),
        ({"features_tier": "SlotFile"}, "features.slot_bytes", "results larger than features.slot_bytes"),
        ({}, "features.max_entries", "raise features.max_entries to the number of symbols"),
        (
            {"features_tier": "SlotFile", "tier_failures": 3},
            "run.data_dir",
            "slot file in run.data_dir failed 3",
        ),
        (
            {"features_tier": "RedisTier", "tier_failures": 3},
            "features.redis_limit_ms",
            "Redis failed 3 times",
        ),
        ({"features_tier": "RedisTier"}, "features.max_entries", "raise features.max_entries"),
    ],
)
def test_a_feature_cache_that_seldom_hits_is_told_what_keeps_it_from_it(
    changes: dict[str, object], setting: str, words: str
) -> None:
    [advice] = advise(facts(caches={"features": CacheUse(hits=20, misses=180)}, **changes))
    assert (advice.setting, setting in SETTINGS) == (setting, True)
    assert words in advice.text
    assert ("ttl_s" in advice.text) == (setting == "features.ttl_s")


def test_one_lag_or_one_lost_worker_is_no_rate() -> None:
    assert advise(facts(lag_alarms=1, workers_replaced=1)) == []


def test_the_worst_comes_first() -> None:
    found = advise(facts(recent={"garbage": seconds(0.0012), "archive.flush": seconds(0.9)}))
    assert [advice.about for advice in found] == ["archive.flush", "garbage"]


def test_shares_of_a_cycle_are_ordered_and_never_more_than_the_whole() -> None:
    assert cycle_shares({}) == {}
    shares = cycle_shares({"cycle": seconds(1.0), "garbage": seconds(0.1), "analysis": seconds(1.1)})
    assert list(shares.items()) == [("analysis", 1.0), ("garbage", 0.1)]
