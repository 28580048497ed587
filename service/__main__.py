"""The `perpd` command: argv in, exit code out."""

import sys


def main() -> int:
    """Run one perpd command and return its exit code."""
    from service.cli import run_command

    return run_command(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
