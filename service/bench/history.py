"""A synthetic archive of any size: lines as the daemon writes them, compacted as the daemon's upkeep does."""

import random
from decimal import Decimal
from pathlib import Path

import msgspec

from service.archive.compaction import compact_one
from service.archive.manifest import Manifest
from service.archive.segments import encode_line, segment_path, utc_day
from service.records import (
    CloseReason,
    Decision,
    DecisionOutcome,
    PositionSide,
    Record,
    RefusalReason,
    ShadowPosition,
    Signal,
)

BEGIN_MS = 1_735_689_600_000  # 2025-01-01
SEGMENT_RECORDS = 50_000
SYMBOLS = tuple(f"COIN{number:03d}USDT" for number in range(200))
REASONS = tuple(RefusalReason)
# Of all records; a refused signal is three records, one of each stream.
SHARES = {"signals": 0.2, "decisions": 0.4, "shadow_outcomes": 0.4}
STEP_MS = 300_000
_SCORES = ("trend", "structure", "position", "momentum", "volatility")


def make_history(directory: Path, records: int, *, seed: int = 1) -> list[Manifest]:
    """Write and compact; the newest segment of each stream stays as lines. The manifests of the compacted."""
    chance = random.Random(seed)
    manifests: list[Manifest] = []
    for stream, share in SHARES.items():
        left, first = round(records * share), 1
        while left:
            count = min(left, SEGMENT_RECORDS)
            path = _write(directory, stream, first, count, chance)
            left, first = left - count, first + count
            if left and (manifest := compact_one(directory, path, stream, 128)):
                manifests.append(manifest)
    return manifests


def _write(directory: Path, stream: str, first: int, count: int, chance: random.Random) -> Path:
    path = segment_path(directory, stream, utc_day(_at_ms(first)), first)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb", buffering=1 << 20) as file:
        for number in range(first, first + count):
            record = _RECORDS[stream](number, chance)
            file.write(encode_line(number, _at_ms(number), msgspec.json.encode(record)))
    return path


def _at_ms(number: int) -> int:
    return BEGIN_MS + number * STEP_MS // len(SYMBOLS)


def _who(number: int) -> tuple[str, str, PositionSide, int]:
    """Signal id, symbol, side and candle close of the numbered signal."""
    symbol = SYMBOLS[number % len(SYMBOLS)]
    side = PositionSide.LONG if number % 3 else PositionSide.SHORT
    close_ms = BEGIN_MS + number // len(SYMBOLS) * STEP_MS
    return f"ict_smc:{symbol}:{close_ms}:{side}", symbol, side, close_ms


def _signal(number: int, chance: random.Random) -> Record:
    """Features as the strategy makes them: some of few values, most of them any number."""
    from service.analysis.features import FEATURE_NAMES

    signal_id, symbol, side, close_ms = _who(number)
    entry = round(chance.uniform(0.01, 100.0), 5)
    few = {name: chance.choice((0.0, 0.5, 1.0)) for name in FEATURE_NAMES[:11]}
    return Signal(
        signal_id=signal_id,
        strategy="ict_smc",
        symbol=symbol,
        position_side=side,
        candle_close_ms=close_ms,
        entry=entry,
        stop=entry * 0.99,
        target=entry * 1.02,
        atr=entry * chance.uniform(0.001, 0.01),
        confidence=round(chance.uniform(0.45, 1.0), 4),
        scores={name: few[feature] for name, feature in zip(_SCORES, few, strict=False)},
        features={**few, **{name: chance.gauss(0.0, 2.0) for name in FEATURE_NAMES[11:]}},
    )


def _decision(number: int, chance: random.Random) -> Record:
    signal_id, symbol, side, close_ms = _who(number)
    return Decision(
        signal_id=signal_id,
        symbol=symbol,
        position_side=side,
        outcome=DecisionOutcome.REFUSED,
        reason=chance.choice(REASONS).value,
        detail=f"{chance.randrange(1, 9)} positions are open, at most 3",
        rank=number % 10 + 1,
        cycle=number // len(SYMBOLS) + 1,
        decided_ms=close_ms + chance.randrange(60_000),
        equity=Decimal(chance.randrange(900_000, 1_100_000)) / 100,
    )


def _outcome(number: int, chance: random.Random) -> Record:
    signal_id, symbol, side, close_ms = _who(number)
    entry = round(chance.uniform(0.01, 100.0), 5)
    won = chance.random() < 0.4
    return ShadowPosition(
        position_id=f"shadow:{signal_id}",
        signal_id=signal_id,
        symbol=symbol,
        position_side=side,
        entry=entry,
        stop=entry * 0.99,
        target=entry * 1.02,
        opened_ms=close_ms,
        checked_ms=close_ms + 3_600_000,
        favourable_excursion=chance.uniform(0.0, 2.0),
        adverse_excursion=chance.uniform(0.0, 1.0),
        closed_ms=close_ms + STEP_MS * chance.randrange(1, 1_152),
        exit_price=entry * (1.02 if won else 0.99),
        close_reason=(CloseReason.TARGET if won else CloseReason.STOP).value,
        outcome_r=2.0 - chance.uniform(0.1, 0.2) if won else -1.0 - chance.uniform(0.1, 0.2),
        pnl_fraction=0.019 if won else -0.011,
    )


_RECORDS = {"signals": _signal, "decisions": _decision, "shadow_outcomes": _outcome}
