"""The files that platforms read: what they promise, checked against what the platforms accept."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

from service.errors import EXIT_NOT_PERMITTED, EXIT_SETTINGS
from service.settings import CycleSettings, RunSettings

ROOT = Path(__file__).resolve().parents[2]
UNIT = ROOT / "config" / "systemd" / "perpd.service"

# What Railway's parser takes (its configuration reference of 2026-08): key to type.
RAILWAY_KEYS: dict[str, dict[str, type]] = {
    "build": {
        "builder": str,
        "buildCommand": str,
        "dockerfilePath": str,
        "watchPatterns": list,
        "railpackVersion": str,
    },
    "deploy": {
        "startCommand": str,
        "preDeployCommand": list,
        "multiRegionConfig": dict,
        "healthcheckPath": str,
        "healthcheckTimeout": int,
        "restartPolicyType": str,
        "restartPolicyMaxRetries": int,
        "cronSchedule": str,
        "overlapSeconds": int,
        "drainingSeconds": int,
    },
}
RAILWAY_REGIONS_OUTSIDE_THE_UNITED_STATES = {"europe-west4-drams3a", "asia-southeast1-eqsg3a"}


@pytest.fixture
def railway() -> dict[str, Any]:
    return tomllib.loads((ROOT / "railway.toml").read_text(encoding="utf-8"))


def test_railway_knows_every_key_and_its_type(railway: dict[str, Any]) -> None:
    assert set(railway) <= set(RAILWAY_KEYS)
    for section, keys in railway.items():
        for key, value in keys.items():
            assert type(value) is RAILWAY_KEYS[section][key], f"{section}.{key} is {value!r}"


def test_railway_builds_the_dockerfile_and_asks_for_health(railway: dict[str, Any]) -> None:
    assert railway["build"]["builder"] == "DOCKERFILE"
    assert (ROOT / railway["build"]["dockerfilePath"]).is_file()
    assert railway["deploy"]["healthcheckPath"] == "/health"
    assert railway["deploy"]["healthcheckTimeout"] > 0


def test_railway_restarts_a_crash_and_waits_longer_than_a_drain_takes(railway: dict[str, Any]) -> None:
    deploy = railway["deploy"]
    assert deploy["restartPolicyType"] == "ON_FAILURE"  # a stop that was asked for stays one
    assert deploy["drainingSeconds"] >= max(30, RunSettings().drain_limit_s + 10)
    assert deploy["overlapSeconds"] == 0
    assert "cronSchedule" not in deploy


def test_railway_has_restarts_for_a_year_of_one_every_minute(railway: dict[str, Any]) -> None:
    """Ending is how perpd recovers; after the last one positions would be without their daemon."""
    assert 365 * 24 * 60 <= railway["deploy"]["restartPolicyMaxRetries"] < 2**31


def test_railway_runs_one_daemon_outside_the_united_states(railway: dict[str, Any]) -> None:
    regions = railway["deploy"]["multiRegionConfig"]
    assert set(regions) <= RAILWAY_REGIONS_OUTSIDE_THE_UNITED_STATES
    assert list(regions.values()) == [{"numReplicas": 1}]


def test_railway_starts_the_images_own_command(railway: dict[str, Any]) -> None:
    assert "startCommand" not in railway["deploy"]  # a shell in between would eat SIGTERM


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions and their arguments, continued lines joined, comments left out."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    text = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in lines]


def final_stage() -> list[tuple[str, str]]:
    found = instructions()
    last = max(index for index, (name, _) in enumerate(found) if name == "FROM")
    return found[last:]


def argument(name: str) -> str:
    (value,) = (value for instruction, value in final_stage() if instruction == name)
    return value


def test_the_image_has_stages_on_a_slim_base_named_by_an_argument() -> None:
    bases = [value for name, value in instructions() if name == "FROM"]
    assert instructions()[0] == ("ARG", "BASE=python:3.11-slim")
    assert len(bases) >= 2
    assert all(base.split()[0] == "${BASE}" for base in bases)


def test_the_image_runs_perpd_itself_in_exec_form_and_not_as_root() -> None:
    assert argument("ENTRYPOINT") == '["perpd"]'
    assert argument("CMD") == '["run"]'
    user, _, group = argument("USER").partition(":")
    assert int(user) > 0
    assert int(group) > 0
    assert argument("STOPSIGNAL") == "SIGTERM"


def test_the_image_installs_locked_wheels_only_and_carries_no_compiler() -> None:
    runs = [value for name, value in instructions() if name == "RUN"]
    (install,) = (run for run in runs if "requirements.lock" in run)
    assert "--require-hashes" in install
    assert "--only-binary :all:" in install
    everything = " ".join(runs)
    assert not re.search(r"\b(apt-get|apt|apk|gcc|g\+\+|build-essential|clang|make)\b", everything)
    assert [run for run in runs if "|| true" in run] == []


def test_the_image_settles_the_allocator_before_the_daemon_starts() -> None:
    environment = dict(item.split("=", 1) for item in argument("ENV").split())
    assert environment["MALLOC_ARENA_MAX"] == "2"
    assert int(environment["MALLOC_TRIM_THRESHOLD_"]) > 0
    assert environment["PYTHONUNBUFFERED"] == "1"


def test_the_image_keeps_data_where_its_user_may_write_and_has_no_volume_instruction() -> None:
    names = [name for name, _ in final_stage()]
    assert "VOLUME" not in names  # Railway refuses it
    assert argument("WORKDIR") == "/data"
    assert any("--mode=0700 /data" in value for name, value in final_stage() if name == "RUN")


def test_what_the_image_copies_exists_and_is_not_ignored() -> None:
    kept = {
        line.removeprefix("!").rstrip("/")
        for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
        if line.startswith("!")
    }
    copied = [
        value.split()[:-1] for name, value in instructions() if name == "COPY" and "--from" not in value
    ]
    for source in (path for paths in copied for path in paths):
        assert (ROOT / source).exists(), source
        assert source in kept
    assert ".git" not in kept


def unit_values(key: str) -> list[str]:
    lines = UNIT.read_text(encoding="utf-8").splitlines()
    return [line.partition("=")[2] for line in lines if line.startswith(f"{key}=")]


def test_systemd_finds_nothing_wrong_with_the_unit() -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed here")
    result = subprocess.run([analyze, "verify", str(UNIT)], capture_output=True, text=True, timeout=60)
    assert (result.stdout, result.stderr) == ("", "")


def test_the_unit_is_told_when_the_daemon_is_ready_and_alive() -> None:
    assert unit_values("Type") == ["notify"]
    assert unit_values("NotifyAccess") == ["main"]
    # Life is told once a cycle: a limit near the interval would kill a healthy daemon.
    assert int(unit_values("WatchdogSec")[0]) >= 3 * CycleSettings().interval_s


def test_the_unit_waits_for_the_drain_and_does_not_repeat_what_cannot_succeed() -> None:
    assert int(unit_values("TimeoutStopSec")[0]) >= RunSettings().drain_limit_s + 10
    assert unit_values("Restart") == ["on-failure"]
    prevented = {int(code) for code in unit_values("RestartPreventExitStatus")[0].split()}
    assert prevented == {EXIT_NOT_PERMITTED, EXIT_SETTINGS}
    assert unit_values("StartLimitIntervalSec") == ["0"]  # an outage is longer than any count of starts


def test_the_unit_passes_credentials_and_a_state_directory() -> None:
    assert [value.partition(":")[0] for value in unit_values("LoadCredential")] == [
        "binance_key",
        "binance_secret",
    ]
    assert unit_values("StateDirectory") == ["perpd"]
    assert "PERPD_RUN__DATA_DIR=%S/perpd" in unit_values("Environment")
    assert unit_values("DynamicUser") == ["yes"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("NoNewPrivileges", "yes"),
        ("ProtectSystem", "strict"),
        ("ProtectHome", "yes"),
        ("PrivateTmp", "yes"),
        ("PrivateDevices", "yes"),
        ("PrivateUsers", "yes"),
        ("ProtectKernelTunables", "yes"),
        ("ProtectKernelModules", "yes"),
        ("ProtectKernelLogs", "yes"),
        ("ProtectControlGroups", "yes"),
        ("ProtectProc", "invisible"),
        ("RestrictAddressFamilies", "AF_INET AF_INET6 AF_UNIX"),
        ("RestrictNamespaces", "yes"),
        ("LockPersonality", "yes"),
        ("CapabilityBoundingSet", ""),
        ("SystemCallArchitectures", "native"),
        ("OOMPolicy", "continue"),
    ],
)
def test_the_unit_is_hardened(key: str, value: str) -> None:
    assert unit_values(key) == [value]


def test_the_unit_leaves_proc_readable_for_the_memory_budget() -> None:
    assert unit_values("ProcSubset") == []
