"""The commands of the kill switch: their names, what they do, and that in words. Imports nothing."""

COMMANDS = {
    "stop-entries": ("no_entries", "kill switch: open nothing until resumed"),
    "reduce-only": ("reduce_only", "kill switch: send nothing that adds to a position until resumed"),
    "flatten": ("flatten", "kill switch: close all positions at market and open nothing until resumed"),
    "resume": ("resume", "lift the kill switch; needs a reason, shows what is lifted"),
}
