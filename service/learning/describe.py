"""What a dataset looks like: balance of the classes, ranges of the features, drift between the splits.

Two passes over the chunks, one in memory at a time: bounds from the training set first, then counts.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from service.learning.dataset import Dataset, day_and_time
from service.learning.splits import SPLITS

Floats = npt.NDArray[np.float64]

BINS = 10
SAMPLE_RECORDS = 200_000
"""Examples of the training set that the bins' bounds are taken from, evenly over its chunks."""
_LEAST_SHARE = 1e-4  # an empty bin counts as this share, or the drift would be endless
NOTABLE_DRIFT, LARGE_DRIFT = 0.1, 0.25
"""The population stability index's usual bounds."""


class FeatureFacts(msgspec.Struct, frozen=True):
    """One feature over all splits."""

    name: str
    least: float
    mean: float
    greatest: float
    missing: int
    drift: dict[str, float]  # population stability index of a later split against train


class SplitFacts(msgspec.Struct, frozen=True):
    """One split."""

    name: str
    from_ms: int
    until_ms: int
    records: int
    won: int
    traded: int  # that have a real position's result too
    mean_r: float
    weight: float  # sum

    @property
    def win_fraction(self) -> float:
        return self.won / self.records if self.records else 0.0


class Description(msgspec.Struct, frozen=True):
    """All that `perpd dataset describe` prints."""

    strategy: str
    splits: tuple[SplitFacts, ...]
    features: tuple[FeatureFacts, ...]
    dropped: dict[str, int]
    read: int
    kept: int
    joined: int
    outcomes: int
    one_to_one: bool


def describe(dataset: Dataset) -> Description:
    """Read the whole dataset twice."""
    names = dataset.manifest.features
    bounds = _bounds(dataset, len(names))
    shares: dict[str, Floats] = {}
    totals = _Totals(len(names))
    splits = []
    for files in dataset.manifest.splits:
        facts, counted = _split(dataset, files.name, files.from_ms, files.until_ms, bounds, totals)
        splits.append(facts)
        shares[files.name] = counted
    drift = {name: _stability(shares["train"], shares[name]) for name in SPLITS[1:] if shares[name].sum() > 0}
    manifest = dataset.manifest
    return Description(
        strategy=manifest.strategy,
        splits=tuple(splits),
        features=tuple(
            totals.facts(place, name, {split: float(values[place]) for split, values in drift.items()})
            for place, name in enumerate(names)
        ),
        dropped=manifest.dropped,
        read=manifest.read,
        kept=manifest.kept,
        joined=manifest.joined,
        outcomes=manifest.outcomes,
        one_to_one=manifest.one_to_one,
    )


class _Totals:
    """Range and mean of each feature, over all chunks."""

    def __init__(self, features: int) -> None:
        self.least = np.full(features, np.inf)
        self.greatest = np.full(features, -np.inf)
        self.sum = np.zeros(features)
        self.count = np.zeros(features, dtype=np.int64)
        self.missing = np.zeros(features, dtype=np.int64)

    def add(self, values: npt.NDArray[np.float32]) -> None:
        there = ~np.isnan(values)
        self.missing += (~there).sum(axis=0)
        self.count += there.sum(axis=0)
        self.sum += np.where(there, values, 0.0).sum(axis=0, dtype=np.float64)
        self.least = np.minimum(self.least, np.where(there, values, np.inf).min(axis=0))
        self.greatest = np.maximum(self.greatest, np.where(there, values, -np.inf).max(axis=0))

    def facts(self, place: int, name: str, drift: dict[str, float]) -> FeatureFacts:
        count = int(self.count[place])
        return FeatureFacts(
            name=name,
            least=float(self.least[place]),
            mean=float(self.sum[place]) / count if count else float("nan"),
            greatest=float(self.greatest[place]),
            missing=int(self.missing[place]),
            drift=drift,
        )


def _bounds(dataset: Dataset, features: int) -> list[Floats]:
    """Inner bounds of each feature's bins: quantiles of the training set, equal ones merged."""
    chunks = next((len(s.chunks) for s in dataset.manifest.splits if s.name == "train"), 0)
    records = next((s.records for s in dataset.manifest.splits if s.name == "train"), 0)
    step = max(records // SAMPLE_RECORDS, 1)
    # Copies: a slice would keep its whole chunk, and with it the training set, in memory.
    sample = [chunk.features[::step].copy() for chunk in dataset.chunks("train")] if chunks else []
    joined = np.concatenate(sample) if sample else np.empty((0, features), dtype=np.float32)
    fractions = np.linspace(0, 1, BINS + 1)[1:-1]
    return [
        np.unique(np.nanquantile(joined[:, place].astype(np.float64), fractions))
        if joined.shape[0]
        else np.empty(0)
        for place in range(features)
    ]


def _split(
    dataset: Dataset, name: str, from_ms: int, until_ms: int, bounds: Sequence[Floats], totals: _Totals
) -> tuple[SplitFacts, Floats]:
    counted = np.zeros((len(bounds), BINS))
    records = won = traded = 0
    sum_r = weight = 0.0
    for chunk in dataset.chunks(name):
        records += chunk.won.size
        won += int(chunk.won.sum())
        traded += int((~np.isnan(chunk.real_r)).sum())
        sum_r += float(chunk.outcome_r.sum(dtype=np.float64))
        weight += float(chunk.weight.sum(dtype=np.float64))
        totals.add(chunk.features)
        for place, inner in enumerate(bounds):
            bins = np.searchsorted(inner, chunk.features[:, place], side="right")
            counted[place] += np.bincount(bins, minlength=BINS)[:BINS]
    facts = SplitFacts(
        name=name,
        from_ms=from_ms,
        until_ms=until_ms,
        records=records,
        won=won,
        traded=traded,
        mean_r=sum_r / records if records else float("nan"),
        weight=weight,
    )
    return facts, counted


def _stability(expected: Floats, found: Floats) -> Floats:
    """Population stability index of each feature: sum of (p - q) ln (p / q) over its bins."""
    p = np.maximum(expected / expected.sum(axis=1, keepdims=True), _LEAST_SHARE)
    q = np.maximum(found / found.sum(axis=1, keepdims=True), _LEAST_SHARE)
    # A bin that the merged bounds left unused is empty on both sides and adds nothing.
    index: Floats = ((p - q) * np.log(p / q)).sum(axis=1)
    return index


def lines(description: Description) -> Iterator[str]:
    """The description for a reader."""
    d = description
    yield f"strategy {d.strategy}: {d.read:,} signals read, {d.kept:,} kept"
    yield (
        f"labels joined one to one: {'yes' if d.one_to_one else 'no'} "
        f"({d.joined:,} signals met an outcome, {d.outcomes:,} outcomes are in the archive)"
    )
    for reason, count in d.dropped.items():
        yield f"  dropped, {reason}: {count:,}"
    yield ""
    yield (
        f"{'split':<12}{'from (UTC)':>18}{'until':>18}{'records':>12}{'won':>8}{'mean R':>9}"
        f"{'traded':>8}{'weight':>12}"
    )
    for split in d.splits:
        yield (
            f"{split.name:<12}{day_and_time(split.from_ms):>18}{day_and_time(split.until_ms):>18}"
            f"{split.records:>12,}{split.win_fraction:>8.1%}{split.mean_r:>9.3f}"
            f"{split.traded:>8,}{split.weight:>12,.1f}"
        )
    yield ""
    yield (
        f"{'feature':<24}{'least':>12}{'mean':>12}{'greatest':>12}{'missing':>9}"
        f"{'drift validation':>18}{'drift test':>12}"
    )
    for feature in d.features:
        validation, test = (feature.drift.get(name, float("nan")) for name in SPLITS[1:])
        yield (
            f"{feature.name:<24}{feature.least:>12.4g}{feature.mean:>12.4g}{feature.greatest:>12.4g}"
            f"{feature.missing:>9,}{validation:>18.3f}{test:>12.3f}{_verdict(feature)}"
        )
    yield ""
    yield (
        "drift is the population stability index against train: "
        f"from {NOTABLE_DRIFT} notable, from {LARGE_DRIFT} large"
    )


def _verdict(feature: FeatureFacts) -> str:
    worst = max(feature.drift.values(), default=0.0)
    if worst >= LARGE_DRIFT:
        return "  large"
    return "  notable" if worst >= NOTABLE_DRIFT else ""


def as_json(description: Description) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.to_builtins(description)
    return found
