"""Collections at the end of a cycle: they find circles, and cost what they may."""

import enum
import gc
import types
import typing
import weakref
from collections.abc import Iterator
from decimal import Decimal

import msgspec
import pytest

from service import records
from service.monitor.collection import Collector

SCALARS = {str, int, float, bool, Decimal, type(None)}


class Notes:
    def __init__(self) -> None:
        self.seconds: list[tuple[str, float]] = []
        self.counts: dict[str, int] = {}

    def record(self, operation: str, seconds: float) -> None:
        self.seconds.append((operation, seconds))

    def count(self, name: str, amount: int = 1) -> None:
        self.counts[name] = self.counts.get(name, 0) + amount


class Circle:
    def __init__(self) -> None:
        self.itself = self


@pytest.fixture
def quiet_collector() -> Iterator[None]:
    """No collection but those asked for; what is frozen here is thawed."""
    gc.disable()
    yield
    gc.unfreeze()
    gc.enable()


def test_a_circle_made_after_the_freeze_is_found_and_counted(quiet_collector: None) -> None:
    notes = Notes()
    collector = Collector(notes, limit_ms=1e9)
    collector.freeze()
    collector.collect()
    before = notes.counts["garbage.objects"]
    gone = weakref.ref(Circle())
    assert gone() is not None
    assert collector.collect() > 0.0
    assert gone() is None
    assert notes.counts["garbage.objects"] > before
    assert [name for name, _ in notes.seconds] == ["garbage", "garbage"]


def test_what_is_alive_at_the_freeze_is_not_looked_at_again(quiet_collector: None) -> None:
    Collector(Notes(), limit_ms=1.0).freeze()
    assert gc.get_freeze_count() > 10_000
    assert len(gc.get_objects()) < 1_000


def collections_of(costs_ms: list[float], *, limit_ms: float) -> list[int]:
    """The generation collected in each cycle: full ones cost what is given, young ones nothing."""
    now_s = 0.0
    generations: list[int] = []

    def collect(generation: int) -> int:
        nonlocal now_s
        if generation == 2:
            now_s += costs_ms[len(generations)] / 1000
        generations.append(generation)
        return 0

    collector = Collector(Notes(), limit_ms=limit_ms, cpu_s=lambda: now_s, collect=collect)
    for _ in costs_ms:
        collector.collect()
    return generations


def test_collections_within_the_limit_are_full_each_cycle() -> None:
    assert collections_of([0.25, 1.0, 0.9, 0.3], limit_ms=1.0) == [2, 2, 2, 2]


def test_costly_collections_become_rarer_so_that_the_mean_cost_keeps_the_limit() -> None:
    generations = collections_of([4.0] * 400, limit_ms=1.0)
    assert generations[:9] == [2, 1, 1, 1, 2, 1, 1, 1, 2]
    assert generations.count(2) * 4.0 / len(generations) <= 1.0


def test_one_slow_collection_is_paid_back_and_then_all_is_as_before() -> None:
    assert collections_of([0.3, 3.0, 0.3, 0.3, 0.3, 0.3], limit_ms=1.0) == [2, 2, 1, 1, 2, 2]


def kinds(annotation: object) -> set[object]:
    """The types a field may hold."""
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return {kind for one in typing.get_args(annotation) for kind in kinds(one)}
    return {annotation}


def uncollected() -> list[type[msgspec.Struct]]:
    """Records the collector skips."""
    found = [kind for kind in vars(records).values() if isinstance(kind, type)]
    return [k for k in found if issubclass(k, msgspec.Struct) and not k.__struct_config__.gc]


@pytest.mark.parametrize("kind", uncollected(), ids=lambda kind: kind.__name__)
def test_a_record_the_collector_skips_holds_nothing_that_could_close_a_circle(kind: type) -> None:
    for name, annotation in typing.get_type_hints(kind).items():
        for one in kinds(annotation):
            scalar = one in SCALARS or (isinstance(one, type) and issubclass(one, enum.Enum))
            assert scalar or one == dict[str, float], f"{kind.__name__}.{name}: {one}"


def test_records_made_by_the_thousand_are_skipped() -> None:
    names = {kind.__name__ for kind in uncollected()}
    assert names >= {"ShadowPosition", "Signal", "Decision", "Order", "Fill", "Position", "CandleUpdate"}
