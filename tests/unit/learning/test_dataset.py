import tracemalloc
from pathlib import Path

import msgspec
import numpy as np
import pytest

from service.errors import HistoryUnusable
from service.learning import describe as describe_module
from service.learning.dataset import MANIFEST, Dataset, Manifest, SplitFiles, build
from service.learning.describe import describe, lines
from service.learning.picture import svg
from service.learning.processor import Chunk, MLDataProcessor
from service.learning.splits import SPLITS
from tests.unit.learning.conftest import HOUR_MS, History

FRACTIONS = (0.6, 0.2, 0.2)


def built(history: History, directory: Path, **options):
    processor = MLDataProcessor(history.connection, **options)
    return build(processor, directory, fractions=FRACTIONS, embargo_ms=24 * HOUR_MS)


def test_a_dataset_is_read_back_split_by_split_in_the_order_of_time(history: History, tmp_path: Path):
    history.hours(100)
    manifest = built(history, tmp_path / "d", chunk_records=7)
    dataset = Dataset(tmp_path / "d")
    assert dataset.manifest == manifest
    assert manifest.one_to_one
    assert manifest.embargo_ms == int(99 * HOUR_MS * 0.05)
    ends = []
    for split in manifest.splits:
        chunks = list(dataset.chunks(split.name))
        opened = np.concatenate([chunk.opened_ms for chunk in chunks])
        assert opened.size == split.records
        assert (np.diff(opened) >= 0).all()
        ends.append((opened[0], max(chunk.closed_ms.max() for chunk in chunks)))
    assert ends[0][1] < ends[1][0] - manifest.embargo_ms + HOUR_MS
    assert ends[1][1] < ends[2][0]
    assert manifest.read == manifest.kept + sum(manifest.dropped.values())


def test_a_directory_in_use_is_refused_and_untouched(history: History, tmp_path: Path):
    history.hours(50)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "mine").write_text("x")
    with pytest.raises(HistoryUnusable, match="is not empty"):
        built(history, tmp_path / "d")
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_a_split_that_would_be_empty_is_refused_with_what_was_dropped(history: History, tmp_path: Path):
    for hour in range(10):
        history.signal("A", (hour + 1) * HOUR_MS)
    with pytest.raises(HistoryUnusable, match="of 10 signals these were dropped: no outcome yet 10"):
        built(history, tmp_path / "d")
    assert list(tmp_path.iterdir()) == []


def test_another_version_is_refused(history: History, tmp_path: Path):
    history.hours(50)
    built(history, tmp_path / "d")
    file = tmp_path / "d" / "manifest.json"
    file.write_bytes(msgspec.json.encode(msgspec.json.decode(file.read_bytes()) | {"version": 99}))
    with pytest.raises(HistoryUnusable, match="has version 99, this perpd reads 1"):
        Dataset(tmp_path / "d")
    with pytest.raises(HistoryUnusable, match="is no dataset"):
        Dataset(tmp_path)


def test_a_description_shows_balance_ranges_and_drift(history: History, tmp_path: Path):
    history.hours(200)
    built(history, tmp_path / "d")
    found = describe(Dataset(tmp_path / "d"))
    assert [split.name for split in found.splits] == ["train", "validation", "test"]
    assert sum(split.records for split in found.splits) == found.kept
    x, y = found.features
    assert (x.least, y.greatest, x.missing) == (0.0, 1.0, 0)
    assert x.drift["test"] > 1.0  # it is the hour itself: no test hour is like a train hour
    assert y.drift["test"] < 0.01
    text = "\n".join(lines(found))
    assert "labels joined one to one: yes (400 signals met an outcome, 400 outcomes" in text
    picture = svg(found)
    assert picture.startswith("<svg")
    assert all(word in picture for word in ("validation", ">x<"))


def test_a_description_holds_one_chunk_however_many_there_are(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(describe_module, "SAMPLE_RECORDS", 2_000)
    chunks, records, features = 40, 5_000, 8
    rng = np.random.default_rng(1)
    names = tuple(f"train-{number:05d}.npz" for number in range(chunks))
    for name in names:
        found = {field: np.zeros(records) for field in Chunk._fields}
        found["features"] = rng.random((records, features), dtype=np.float32)
        np.savez(tmp_path / name, **found)
    kept = chunks * records
    manifest = Manifest(
        version=1,
        strategy="s",
        features=tuple(f"f{number}" for number in range(features)),
        splits=tuple(SplitFiles(split, 0, 1, kept, names) for split in SPLITS),
        embargo_ms=0,
        embargo_asked_ms=0,
        read=kept,
        kept=kept,
        dropped={},
        joined=kept,
        outcomes=kept,
        one_to_one=True,
    )
    (tmp_path / MANIFEST).write_bytes(msgspec.json.encode(manifest))
    tracemalloc.start()
    try:
        described = describe(Dataset(tmp_path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert described.splits[0].records == kept
    whole = chunks * (tmp_path / names[0]).stat().st_size
    assert peak < whole / 4, f"{peak / 1e6:.1f} MB of {whole / 1e6:.1f} MB"
