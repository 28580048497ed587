"""The version of all code a strategy's result depends on, so that no result outlives its code."""

import hashlib
import os
import sys
from collections.abc import Iterable
from pathlib import Path

import msgspec

from service.learning.loaded_modules import Module, is_installed
from service.settings import StrategySettings

_FORMAT = b"perpd features 1"  # changes when stored results change their form


def code_version(strategy: StrategySettings, modules: Iterable[Module]) -> bytes:
    """32 bytes of the strategy's name and options and the modules' code. Reads files.

    Of installed packages the files' size and time stand for their content.
    """
    digest = hashlib.sha256(_FORMAT + sys.version.encode())
    digest.update(msgspec.msgpack.encode([strategy.name, sorted(strategy.options.items())]))
    for name, file in modules:
        digest.update(f"|{name}|".encode() + _content(file))
    return digest.digest()


def _content(file: str) -> bytes:
    try:
        if is_installed(file):
            facts = os.stat(file)
            return f"{facts.st_size}|{facts.st_mtime_ns}".encode()
        return hashlib.sha256(Path(file).read_bytes()).digest()
    except OSError:
        return b"?"
