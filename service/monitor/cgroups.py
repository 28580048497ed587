"""What the control groups around this process allow and hold, in version 2, version 1 and hybrids of both.

A group's limit binds all below it, so every group up to the root is looked at. What is absent, unreadable or
nonsense is no limit.
"""

from collections.abc import Iterator
from pathlib import Path

_NO_LIMIT_BYTES = 1 << 60  # version 1 writes a number near 2**63 for "none"


def limits_bytes(proc: Path, cgroups: Path) -> Iterator[int]:
    """Each memory limit of this process's groups. Args: where proc and the groups are mounted."""
    # Each controller by itself: a hybrid host has a v2 tree, with memory still in v1.
    for directory in unified(proc, cgroups):
        text = read_text(directory / "memory.max").strip()
        if text.isdigit():
            yield int(text)
    for directory in _memory_v1(proc, cgroups):
        text = read_text(directory / "memory.limit_in_bytes").strip()
        if text.isdigit() and int(text) < _NO_LIMIT_BYTES:
            yield int(text)


def working_sets(proc: Path, cgroups: Path) -> Iterator[tuple[int, int]]:
    """Working set and limit in bytes, of each group of this process that has a limit."""
    for directories, limit_name, usage_name in (
        (unified(proc, cgroups), "memory.max", "memory.current"),
        (_memory_v1(proc, cgroups), "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        for directory in directories:
            limit, usage = (read_text(directory / name).strip() for name in (limit_name, usage_name))
            if limit.isdigit() and usage.isdigit() and 0 < int(limit) < _NO_LIMIT_BYTES:
                yield max(int(usage) - _droppable_bytes(directory), 0), int(limit)


def _droppable_bytes(directory: Path) -> int:
    """File pages the kernel drops before it kills: inactive ones, and active ones that no process maps.

    The archive's own pages are of the second kind: appended to, so active, and never read again. A daemon
    that writes would otherwise seem to fill any limit.
    """
    found = _statistics(directory)
    inactive, active = found.get("inactive_file", 0), found.get("active_file", 0)
    mapped = found.get("file_mapped", found.get("mapped_file", inactive + active))  # version 2, version 1
    return max(inactive, inactive + active - mapped)


def _statistics(directory: Path) -> dict[str, int]:
    """memory.stat by name; in version 1 of the group with all below it."""
    found: dict[str, int] = {}
    for line in read_text(directory / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if value.isdigit():
            name = name.removeprefix("total_")
            found[name] = max(int(value), found.get(name, 0))  # version 1 has the group alone as well
    return found


def unified(proc: Path, cgroups: Path) -> Iterator[Path]:
    """Directories of the version 2 groups of this process, the root first."""
    for line in read_text(proc / "self" / "cgroup").splitlines():
        if line.startswith("0::"):
            for root in (cgroups, cgroups / "unified"):
                yield from _ancestors(root, line.removeprefix("0::"))


def _memory_v1(proc: Path, cgroups: Path) -> Iterator[Path]:
    for line in read_text(proc / "self" / "cgroup").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if "memory" in controllers.split(","):
            yield from _ancestors(cgroups / "memory", path)


def _ancestors(root: Path, path: str) -> Iterator[Path]:
    """The cgroup and all above it up to the root. In a container the path may not exist; the root does."""
    directory = root
    yield directory
    for part in path.strip("/").split("/"):
        if part not in ("", ".."):
            directory /= part
            yield directory


def read_text(path: Path) -> str:
    """The text of a kernel file, empty when it is not there or not ours to read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
