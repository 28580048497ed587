"""A few kills of what 500 do in `perpd archive torture`."""

from pathlib import Path

import msgspec
import pytest

from service.archive.torture import _Ledger, digest, torture


@pytest.mark.parametrize(("kind", "kills"), [("archive", 12), ("daemon", 3)])
def test_no_acknowledged_record_is_lost_or_repeated_by_a_kill(kind: str, kills: int, tmp_path: Path) -> None:
    found = torture(kind, kills, 7, tmp_path)
    assert (found.lost, found.duplicated, found.misnumbered, found.faults) == (0, 0, 0, 0)
    assert found.kills == kills
    assert found.acknowledged > 100
    assert found.kept >= found.acknowledged


def test_a_lost_a_repeated_and_a_misnumbered_record_are_each_counted(tmp_path: Path) -> None:
    day = tmp_path / "orders" / "2025-10-10"
    day.mkdir(parents=True)
    records = [msgspec.json.encode({"name": name}) for name in ("kept", "repeated", "repeated")]
    lines = [
        b'{"v":1,"seq":%d,"archived_ms":0,' % number + record[1:] + b"\n"
        for number, record in zip((1, 2, 4), records, strict=True)
    ]
    (day / "orders-000000000001.jsonl").write_bytes(b"".join(lines))
    ledger = _Ledger(tmp_path)
    for record in (*records[:2], b'{"name":"lost"}'):
        ledger.put[digest(record)] += 1
        ledger.acknowledged[digest(record)] += 1

    ledger.settle()
    found = ledger.found(1, 0.0)

    assert (found.lost, found.duplicated, found.misnumbered, found.kept) == (1, 1, 1, 3)
