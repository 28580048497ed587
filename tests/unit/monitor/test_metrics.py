import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from service.clock import ManualClock
from service.monitor.metrics import Metric, performance_metrics, render
from service.monitor.performance import PerformanceMonitor
from service.settings import MonitorSettings


@given(st.dictionaries(st.text(max_size=20), st.floats(allow_nan=False), min_size=1, max_size=5), st.text())
def test_prometheus_reads_back_what_was_written(values: dict[str, float], text: str) -> None:
    page = render([Metric.by("symbol", "perpd_price", "gauge", text, values)])
    (family,) = text_string_to_metric_families(page)
    assert family.type == "gauge"
    assert {sample.labels["symbol"]: sample.value for sample in family.samples} == values


def test_a_page_has_help_type_and_value_of_each_metric() -> None:
    page = render(
        [
            Metric.counter("perpd_cycles_total", "Cycles finished.", 3),
            Metric.gauge("perpd_memory_bytes", "PSS of the tree.", 1.5e8),
            Metric.by("stream", "perpd_archive_records_total", "counter", "Archived.", {}),
        ]
    )
    assert page == (
        "# HELP perpd_cycles_total Cycles finished.\n"
        "# TYPE perpd_cycles_total counter\n"
        "perpd_cycles_total 3\n"
        "# HELP perpd_memory_bytes PSS of the tree.\n"
        "# TYPE perpd_memory_bytes gauge\n"
        "perpd_memory_bytes 150000000.0\n"
    )


def test_numbers_that_are_not_finite_are_written_as_prometheus_wants() -> None:
    values = {"a": math.nan, "b": math.inf, "c": -math.inf}
    page = render([Metric.by("kind", "perpd_odd", "gauge", "", values)])
    assert [line.split()[-1] for line in page.splitlines()[2:]] == ["NaN", "+Inf", "-Inf"]


@pytest.mark.parametrize(
    ("kind", "name"),
    [("counter", "perpd_cycles"), ("gauge", "perpd_cycles_total"), ("gauge", "cycles"), ("gauge", "perpd_A")],
)
def test_a_name_against_the_convention_is_refused(kind: str, name: str) -> None:
    with pytest.raises(ValueError, match="not a name"):
        Metric(name, kind, "", (({}, 1.0),))  # type: ignore[arg-type]


def test_a_name_twice_or_a_bad_label_is_refused() -> None:
    metric = Metric.gauge("perpd_lag_seconds", "", 1.0)
    with pytest.raises(ValueError, match="twice"):
        render([metric, metric])
    with pytest.raises(ValueError, match="not a label"):
        render([Metric.by("a b", "perpd_lag_seconds", "gauge", "", {"x": 1.0})])


def test_the_monitors_figures_make_a_page() -> None:
    performance = PerformanceMonitor(MonitorSettings(), ManualClock())
    assert render(performance_metrics(performance)) == ""
    performance.record("cycle", 0.25)
    performance.record("cycle", 0.75)
    performance.count("stale", 2)
    families = {
        family.name: family
        for family in text_string_to_metric_families(render(performance_metrics(performance)))
    }
    assert families["perpd_operations"].samples[0].value == 2
    assert families["perpd_operation_p50_seconds"].samples[0].value == 0.5
    assert families["perpd_operation_p95_seconds"].samples[0].value == pytest.approx(0.725)
    assert families["perpd_events"].samples[0].labels == {"event": "stale"}
