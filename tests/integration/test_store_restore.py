"""A restore that is interrupted leaves a state in its place: the one before, or the one put back."""

import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from service.store.backup import put_back
from service.store.sqlite import connect


class Interrupted(BaseException):
    pass


def written(path: Path, value: str) -> None:
    with closing(connect(path)) as db:
        db.execute("insert or replace into settings values ('kill', ?)", (value,))


def read(path: Path) -> str:
    with closing(sqlite3.connect(f"file:{path}?mode=rw", uri=True)) as db:
        return db.execute("select value from settings where name = 'kill'").fetchone()[0]


STEPS = ("link", "unlink", "replace", "fsync")


@pytest.mark.parametrize("step", range(1, 40))
def test_wherever_a_restore_is_interrupted_there_is_a_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
):
    state, backup, aside = (tmp_path / name for name in ("state", "backup", "aside"))
    written(backup, "of the backup")
    written(state, "tripped")
    left = step

    def interrupting(real):
        def call(*arguments, **options):
            nonlocal left
            left -= 1
            if left <= 0:  # a dead process cleans nothing up
                raise Interrupted
            return real(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        for name in STEPS:
            patch.setattr(os, name, interrupting(getattr(os, name)))
        try:
            assert put_back(backup, state, aside) == aside
        except Interrupted:
            assert left <= 0
    assert read(state) in ("tripped", "of the backup")
    if aside.exists():
        assert read(aside) == "tripped"
    if left > 0:
        assert (read(state), read(aside)) == ("of the backup", "tripped")
        assert {path.name for path in tmp_path.iterdir()} == {"state", "backup", "aside"}


def test_what_the_log_of_the_old_state_holds_is_set_aside_with_it(tmp_path: Path):
    state, backup, aside = (tmp_path / name for name in ("state", "backup", "aside"))
    written(backup, "of the backup")
    written(state, "before")
    held = connect(state)  # as a process that died: its log is not folded in
    held.execute("update settings set value = 'tripped'")
    copies = [(path, path.read_bytes()) for path in tmp_path.glob("state*")]
    held.close()
    for path, content in copies:
        path.write_bytes(content)
    assert (tmp_path / "state-wal").stat().st_size
    put_back(backup, state, aside)
    assert (read(state), read(aside)) == ("of the backup", "tripped")
