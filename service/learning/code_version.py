"""The version of all code a strategy's result depends on, so that no result outlives its code."""

import hashlib
import os
import sys
from collections.abc import Iterable
from pathlib import Path

import msgspec

from service.settings import StrategySettings

_FORMAT = b"perpd features 1"  # changes when stored results change their form

Module = tuple[str, str]
"""Name and file of a loaded module."""


def loaded_modules(strategy: StrategySettings) -> list[Module]:
    """Every module outside the standard library that is loaded once the strategy is; runs where it runs.

    A module that a strategy imports only while it analyses is not seen.
    Raises: StrategyInvalid, SettingsInvalid: the strategy cannot be loaded.
    """
    from service.strategies.loader import load_strategy

    load_strategy(strategy.name, strategy.options)
    standard = os.path.dirname(os.__file__) + os.sep
    files = ((name, getattr(module, "__file__", None)) for name, module in list(sys.modules.items()))
    return sorted(
        (name, file)
        for name, file in files
        if isinstance(file, str) and (_is_installed(file) or not file.startswith(standard))
    )


def code_version(strategy: StrategySettings, modules: Iterable[Module]) -> bytes:
    """32 bytes of the strategy's name and options and the modules' code. Reads files.

    Of installed packages the files' size and time stand for their content.
    """
    digest = hashlib.sha256(_FORMAT + sys.version.encode())
    digest.update(msgspec.msgpack.encode([strategy.name, sorted(strategy.options.items())]))
    for name, file in modules:
        digest.update(f"|{name}|".encode() + _content(file))
    return digest.digest()


def _is_installed(file: str) -> bool:
    return "site-packages" in file or "dist-packages" in file


def _content(file: str) -> bytes:
    try:
        if _is_installed(file):
            facts = os.stat(file)
            return f"{facts.st_size}|{facts.st_mtime_ns}".encode()
        return hashlib.sha256(Path(file).read_bytes()).digest()
    except OSError:
        return b"?"
