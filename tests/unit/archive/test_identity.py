"""The name of an archive."""

from pathlib import Path

from service.archive.identity import identity_of


def test_an_archive_keeps_its_name_and_another_has_another(tmp_path: Path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    assert identity_of(one) == identity_of(one) != identity_of(two)


def test_a_name_that_was_cut_short_is_made_anew(tmp_path: Path):
    (tmp_path / "identity").write_text("\n")
    assert len(identity_of(tmp_path)) == 32
    assert identity_of(tmp_path) == identity_of(tmp_path)


def test_a_disk_that_takes_nothing_costs_the_name_and_not_the_start(tmp_path: Path):
    missing = tmp_path / "missing"
    assert len(identity_of(missing)) == 32
    assert not missing.exists()
