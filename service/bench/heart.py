"""The process behind `heartbeat.beating`: writes its time into a pipe, over and over, until nobody reads.

Run by its path and on its own: it must load nothing and disturb nobody. Arguments: descriptor, interval in s.
"""

import os
import struct
import sys
import time

BEAT = struct.Struct("=q")  # nanoseconds of CLOCK_MONOTONIC, which all processes of a machine share


def main() -> None:
    pipe, interval_s = int(sys.argv[1]), float(sys.argv[2])
    due_s = time.monotonic()
    try:
        while True:
            due_s = max(due_s + interval_s, time.monotonic())  # beats that a full pipe held up are left out
            time.sleep(max(due_s - time.monotonic(), 0.0))
            os.write(pipe, BEAT.pack(time.monotonic_ns()))
    except BrokenPipeError:
        return


if __name__ == "__main__":
    main()
