"""The command line. ``main`` is the console script; exit 0 done, 1 failed (one line on stderr), 2 usage.

Commands that only ask the daemon must feel instant, so this package imports nothing heavy at import: no trio, boto3,
huggingface_hub, pyfuse3, and rich only where something is drawn.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from instantstart_fs.cli import serving
from instantstart_fs.errors import InstantStartError, UsageError


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run ``instantstart`` with ``arguments`` (default: sys.argv) and exit."""
    given = sys.argv[1:] if arguments is None else arguments
    sys.exit(run(given))


def run(arguments: list[str]) -> int:
    """The exit status. Every error that this project raises becomes one line; others are bugs, and show themselves."""
    try:
        if (plain := serving.plain(arguments)) is not None:
            serving.serve(**plain)
        from instantstart_fs.cli.app import app

        status = app(args=arguments, prog_name="instantstart", standalone_mode=True)
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else 1
    except InstantStartError as error:
        _flush()
        print(f"instantstart: {error.message}", file=sys.stderr)
        if "--json" in arguments:
            import json

            print(json.dumps({"error": {"code": error.code, "message": error.message}}))
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # `instantstart ls | head`: whoever read has had enough. Python would complain again while closing stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return status if isinstance(status, int) else 0


def _flush() -> None:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
