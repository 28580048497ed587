"""The machine a benchmark ran on: a number without it says nothing."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("numpy", "TA-Lib", "uvloop")


def machine() -> dict[str, Any]:
    """Facts in the order they are printed. The load average is that of now, before the benchmark."""
    from service.monitor.memory import available_cpus

    return {
        "cpu": _field("/proc/cpuinfo", "model name") or platform.processor() or "unknown",
        "cores": os.cpu_count() or 0,
        "usable_cores": available_cpus(),
        "memory_mb": int((_field("/proc/meminfo", "MemTotal") or "0").split()[0]) // 1024,
        "kernel": f"{platform.system()} {platform.release()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        **{name: _version(name) for name in _PACKAGES},
        "load_average_1m": round(os.getloadavg()[0], 2),
    }


def file_system(directory: Path) -> str:
    """Type of the file system that holds a directory; "unknown" where the kernel does not tell."""
    wanted = directory.resolve()
    best, kind = "", "unknown"
    for line in _text("/proc/self/mounts").splitlines():
        _, mounted_on, mount_kind, *_ = line.split(" ")
        at = mounted_on.replace("\\040", " ")
        if len(at) > len(best) and wanted.is_relative_to(at):
            best, kind = at, mount_kind
    return kind


def _field(path: str, name: str) -> str:
    for line in _text(path).splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"
