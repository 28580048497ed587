"""The data directory is refused with a reason before anything is traded."""

import subprocess
from pathlib import Path

import msgspec
import pytest

from service.directory import claim, data_directory, marked_name, market_name
from service.errors import DataDirectoryUnusable
from service.settings import RunSettings, Settings, SimSettings


def settings_for(directory: Path | str, **sim: object) -> Settings:
    return Settings(run=RunSettings(data_dir=str(directory)), sim=SimSettings(**sim))


def test_a_directory_is_made_and_locked(tmp_path):
    with data_directory(settings_for(tmp_path / "a" / "b")) as directory:
        with (
            pytest.raises(DataDirectoryUnusable, match="held by another perpd"),
            data_directory(settings_for(directory)),
        ):
            pass
    with data_directory(settings_for(tmp_path / "a" / "b")):
        pass  # the lock went with the block


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(
            DataDirectoryUnusable, match=r"file/data: a file is in its place or above it.*--data-dir"
        ),
        data_directory(settings_for(tmp_path / "file" / "data")),
    ):
        pass


def test_a_full_disk_is_named_before_the_first_record(tmp_path):
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", str(tmp_path)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs is not permitted here")
    try:
        with (
            pytest.raises(DataDirectoryUnusable, match="No space left"),
            data_directory(settings_for(tmp_path / "data")),
        ):
            pass
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_books_of_another_market_are_never_continued(tmp_path):
    first = settings_for(tmp_path, seed=1)
    with data_directory(first) as directory:
        claim(first, directory)
    with (
        pytest.raises(
            DataDirectoryUnusable, match="holds the books of 'sim-seed1-200', this run is 'sim-seed2-200'"
        ),
        data_directory(settings_for(tmp_path, seed=2)),
    ):
        pass


def test_a_directory_is_nobodys_until_it_is_claimed(tmp_path):
    with data_directory(settings_for(tmp_path, seed=1)) as directory:
        assert marked_name(directory) == ""
    second = settings_for(tmp_path, seed=2)
    with data_directory(second) as directory:
        claim(second, directory)
        assert marked_name(directory) == "sim-seed2-200"


def test_each_mode_and_market_has_its_own_name():
    base = Settings()
    others = [
        msgspec.structs.replace(base, run=RunSettings(mode="paper")),
        msgspec.structs.replace(base, run=RunSettings(mode="live")),
        msgspec.structs.replace(base, sim=SimSettings(seed=2)),
        msgspec.structs.replace(base, sim=SimSettings(replay="somewhere")),
        msgspec.structs.replace(base, sim=SimSettings(replay="somewhere", until_time="2025-10-11")),
        msgspec.structs.replace(base, sim=SimSettings(url="http://127.0.0.1:1")),
    ]
    assert len({market_name(one) for one in [base, *others]}) == 7
