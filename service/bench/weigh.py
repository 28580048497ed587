"""Weigh each module while it is imported. Run apart; it loads nothing that a bare interpreter has not."""

import os
import sys
import time

TYPE_CHECKING = False  # not typing's: its memory would be counted as the interpreter's
if TYPE_CHECKING:
    from typing import Any


class Meter:
    """Finds modules as the interpreter would, and weighs each while it is loaded."""

    def __init__(self) -> None:
        # name to bytes and seconds of its own, then with all it imported for the first time
        self.modules: dict[str, list[float]] = {}
        self.measuring_s = 0.0
        self._within: list[list[float]] = []  # per module being loaded: bytes and seconds of those inside it

    def find_spec(self, name: str, path: "Any" = None, target: "Any" = None) -> "Any":
        for finder in sys.meta_path:
            if finder is not self and hasattr(finder, "find_spec"):
                spec = finder.find_spec(name, path, target)
                if spec is not None:
                    self._weigh(spec)
                    return spec
        return None

    def _weigh(self, spec: "Any") -> None:
        """Wrap the one loader object of this module; classes stay as they are."""
        loader = spec.loader
        if loader is None or isinstance(loader, type):
            return  # a namespace package, or built into the interpreter: nothing is read
        for step in ("create_module", "exec_module"):  # an extension is mapped by the first
            original = getattr(loader, step, None)
            if original is not None:
                setattr(loader, step, self._weighed(spec.name, original))

    def _weighed(self, name: str, load: "Any") -> "Any":
        def weighed(argument: "Any") -> "Any":
            size_before, began_s, measuring_before_s = self._now()
            self._within.append([0, 0.0])
            try:
                return load(argument)
            finally:
                size_after, ended_s, measuring_after_s = self._now()
                measuring_s = measuring_after_s - measuring_before_s
                total = [size_after - size_before, ended_s - began_s - measuring_s]
                inner = self._within.pop()
                own = [total[0] - inner[0], total[1] - inner[1]]
                before = self.modules.get(name, [0, 0.0, 0, 0.0])
                self.modules[name] = [a + b for a, b in zip(before, own + total, strict=True)]
                if self._within:
                    self._within[-1] = [a + b for a, b in zip(self._within[-1], total, strict=True)]

        return weighed

    def _now(self) -> tuple[int, float, float]:
        """(resident bytes, seconds, seconds spent measuring so far), the latter two after the reading."""
        began_s = time.perf_counter()
        resident = memory()["Rss"]
        ended_s = time.perf_counter()
        self.measuring_s += ended_s - began_s
        return resident, ended_s, self.measuring_s


def memory() -> dict[str, int]:
    """This process's memory by kind, in bytes, exact."""
    sizes = {}
    with open("/proc/self/smaps_rollup") as file:
        file.readline()
        for line in file:
            name, _, size = line.partition(":")
            sizes[name] = int(size.split()[0]) * 1024
    return sizes


def weigh(modules: list[str]) -> "dict[str, Any]":
    """Import the modules and say what each of them, and of theirs, cost."""
    bare = memory()
    before = len(sys.modules)
    meter = Meter()
    sys.meta_path.insert(0, meter)
    began_s = time.perf_counter()
    for module in modules:
        __import__(module)
    seconds = time.perf_counter() - began_s - meter.measuring_s
    sys.meta_path.remove(meter)
    after = memory()
    return {
        "bare_bytes": bare["Rss"],
        "resident_bytes": after["Rss"],
        "unique_bytes": after["Private_Clean"] + after["Private_Dirty"],
        "seconds": seconds,
        "modules_before": before,
        "modules_after": len(sys.modules),
        "packages_loaded": sorted({name.partition(".")[0] for name in sys.modules}),
        "modules": [
            {"name": name, "own_bytes": own_bytes, "own_s": own_s, "total_bytes": total, "total_s": total_s}
            for name, (own_bytes, own_s, total, total_s) in sorted(
                meter.modules.items(), key=lambda item: -item[1][0]
            )
        ],
    }


def main() -> None:
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # as the nursery does before it imports numpy
    found = weigh(sys.argv[1].strip('"').split(","))
    import json

    print(json.dumps(found))  # noqa: T201


if __name__ == "__main__":
    main()
