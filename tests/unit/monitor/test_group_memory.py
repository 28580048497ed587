"""What the kernel says about the control group: its working set and its stalls."""

from pathlib import Path

import pytest

from service.monitor.memory import MemorySampler

MB = 1024 * 1024


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def sampler(tmp_path: Path) -> MemorySampler:
    write(tmp_path / "proc" / "self" / "cgroup", "0::/unit\n")
    found = MemorySampler(100, proc=tmp_path / "proc", cgroups=tmp_path / "cgroups")
    found.pss_mb_last = 50.0
    return found


def group(tmp_path: Path, name: str, limit: str, usage: int, inactive_file: int) -> None:
    directory = tmp_path / "cgroups" / name
    write(directory / "memory.max", f"{limit}\n")
    write(directory / "memory.current", f"{usage}\n")
    write(directory / "memory.stat", f"anon 5\ninactive_file {inactive_file}\nactive_file 7\n")


def test_pages_that_can_be_dropped_do_not_count(sampler: MemorySampler, tmp_path: Path) -> None:
    group(tmp_path, "unit", str(100 * MB), 90 * MB, 30 * MB)
    assert sampler.group_fraction() == pytest.approx(0.6)


def test_active_file_pages_count_only_as_far_as_a_process_maps_them(
    sampler: MemorySampler, tmp_path: Path
) -> None:
    group(tmp_path, "unit", str(100 * MB), 90 * MB, 10 * MB)
    stat = tmp_path / "cgroups" / "unit" / "memory.stat"
    write(stat, f"inactive_file {10 * MB}\nactive_file {30 * MB}\nfile_mapped {15 * MB}\n")
    assert sampler.group_fraction() == pytest.approx(0.65)
    write(stat, f"inactive_file {10 * MB}\nactive_file {30 * MB}\nfile_mapped {50 * MB}\n")
    assert sampler.group_fraction() == pytest.approx(0.8)  # inactive ones never count


def test_the_group_nearest_to_its_limit_counts(sampler: MemorySampler, tmp_path: Path) -> None:
    group(tmp_path, "unit", "max", 90 * MB, 0)
    group(tmp_path, ".", str(120 * MB), 108 * MB, 0)
    assert sampler.group_fraction() == pytest.approx(0.9)


def test_a_group_of_which_we_are_a_small_part_is_somebody_elses(
    sampler: MemorySampler, tmp_path: Path
) -> None:
    group(tmp_path, "unit", str(1_000 * MB), 950 * MB, 0)
    assert sampler.group_fraction() == 0.0
    assert sampler.foreign_fraction() == pytest.approx(0.95)
    sampler.pss_mb_last = 500.0
    assert (sampler.group_fraction(), sampler.foreign_fraction()) == (pytest.approx(0.95), 0.0)


def test_version_1_counts_the_inactive_files_of_all_below(tmp_path: Path) -> None:
    write(tmp_path / "proc" / "self" / "cgroup", "4:memory:/unit\n")
    directory = tmp_path / "cgroups" / "memory" / "unit"
    write(directory / "memory.limit_in_bytes", f"{100 * MB}\n")
    write(directory / "memory.usage_in_bytes", f"{80 * MB}\n")
    write(directory / "memory.stat", f"inactive_file 1\ntotal_inactive_file {10 * MB}\n")
    sampler = MemorySampler(0, proc=tmp_path / "proc", cgroups=tmp_path / "cgroups")
    sampler.pss_mb_last = 50.0
    assert sampler.group_fraction() == pytest.approx(0.7)
    files = f"total_inactive_file {10 * MB}\ntotal_active_file {20 * MB}\ntotal_mapped_file {5 * MB}\n"
    write(directory / "memory.stat", f"active_file 1\nmapped_file 1\n{files}")
    assert sampler.group_fraction() == pytest.approx(0.55)


def test_absent_and_unreadable_files_are_no_group(sampler: MemorySampler, tmp_path: Path) -> None:
    assert sampler.group_fraction() == 0.0
    group(tmp_path, "unit", "many", 0, 0)
    write(tmp_path / "cgroups" / "unit" / "memory.stat", "nonsense\n")
    assert sampler.group_fraction() == 0.0
    group(tmp_path, "unit", str(MB), MB, 0)
    write(tmp_path / "cgroups" / "unit" / "memory.stat", "nonsense\ninactive_file x\n")
    assert sampler.group_fraction() == 1.0


def test_stalls_are_the_groups_own_where_it_tells_them(sampler: MemorySampler, tmp_path: Path) -> None:
    assert sampler.pressure_pct() is None
    line = "some avg10=9.00 avg60=0.00 avg300=0.00 total=1\nfull avg10={}.50 avg60=0.00 avg300=0.00 total=0\n"
    write(tmp_path / "proc" / "pressure" / "memory", line.format(7))
    assert sampler.pressure_pct() == 7.5
    write(tmp_path / "cgroups" / "unit" / "memory.pressure", line.format(3))
    assert sampler.pressure_pct() == 3.5
