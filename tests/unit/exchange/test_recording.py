from pathlib import Path

import pytest

from service.errors import SettingsInvalid
from service.exchange.recording import check_market
from service.settings import SimSettings


def refusal(directory: Path) -> str:
    with pytest.raises(SettingsInvalid) as told:
        check_market(SimSettings(replay=str(directory)))
    return str(told.value)


def test_a_directory_of_candles_is_taken_by_the_names_in_it(tmp_path: Path):
    (tmp_path / "AUSDT-5m.csv").touch()
    check_market(SimSettings(replay=str(tmp_path)))


def test_a_replay_without_candles_is_one_message(tmp_path: Path):
    assert "not a directory" in refusal(tmp_path / "none")
    assert "no candle files found" in refusal(tmp_path)


def test_a_directory_that_may_not_be_read_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def denied(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", denied)
    assert refusal(tmp_path) == f"replay directory {tmp_path}: cannot be read: Permission denied"
