"""The profiles of the founding report: what it had before, and what perpd has by default."""

from pathlib import Path

from service.settings import Settings, effective, load

PROFILES = Path(__file__).resolve().parents[2] / "config" / "profiles"


def values(name: str) -> dict[str, object]:
    return {key: value for key, value, _ in effective(load(PROFILES / f"{name}.toml", {}))}


def test_after_is_what_is_built_in() -> None:
    assert load(PROFILES / "after.toml", {}).settings == Settings()


def test_before_differs_in_the_founding_report_s_numbers_and_the_bound_of_the_buffers() -> None:
    before, after = values("before"), values("after")
    changed = {key: (before[key], after[key]) for key in before if before[key] != after[key]}
    assert changed == {
        "analysis.batch_factors": ((3.0, 2.0, 1.0), (2.0, 1.5, 1.0)),
        "archive.buffer_records": (100, 50),
        "archive.buffers_bytes": (0, 81_920),
        "monitor.operations": (1000, 500),
        "monitor.operations_per_kind": (0, 100),
        "features.ttl_s": (3600.0, 1800.0),
        "features.max_entries": (0, 100),
    }


def test_both_write_down_the_same_settings() -> None:
    sources = [load(PROFILES / f"{name}.toml", {}).sources.keys() for name in ("before", "after")]
    assert sources[0] == sources[1]
