"""The command line. ``main`` is the console script. Exit codes: 0 done, 1 failed (one line on stderr), 2 usage,
130 ended by Ctrl-C, 141 by a reader that left.

Commands that only ask the daemon must feel instant. So this package imports nothing heavy: no trio, boto3,
huggingface_hub or pyfuse3, and rich only where something is drawn.
"""

from __future__ import annotations

import contextlib
import errno
import sys

from instantstart_fs.cli import serve, terminal
from instantstart_fs.cli.version import version_line
from instantstart_fs.errors import InstantStartError, UsageError

TYPE_CHECKING = False  # the module itself takes 3 ms of every command
if TYPE_CHECKING:
    from typing import NoReturn


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run ``instantstart`` with ``arguments`` (default: sys.argv) and exit."""
    if arguments is None:
        terminal.ensure_utf8_names()
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: list[str]) -> int:
    """The exit status. Every error that this project raises becomes one line; others are bugs, and show themselves."""
    terminal.prepare()
    streams = sys.stdout, sys.stderr
    status = _run(arguments)
    if (sys.stdout, sys.stderr) != streams:  # typer met a closed pipe
        sys.stdout, sys.stderr = streams
        status = terminal.discard_output(sys.stdout, 141)
    written = terminal.flush()
    return status or written


def _run(arguments: list[str]) -> int:
    try:
        if (plain := serve.parse(arguments)) is not None:
            serve.run(**plain)
        if arguments == ["--version"]:  # without the imports of the commands
            print(version_line())
            return 0
        words = arguments
        if words[:1] == ["--socket"] and words[2:3] == ["run"]:
            words = ["run", *words[:2], *words[3:]]
        if words[:1] == ["run"]:
            from instantstart_fs.startup import options

            if (wanted := options.plain(words)) is not None:
                from instantstart_fs.startup.run import run as run_command

                return run_command(wanted)
        from instantstart_fs.cli.app import app_for

        status = app_for(arguments)(args=arguments, prog_name="instantstart", standalone_mode=True)
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else 1
    except InstantStartError as error:
        return _fail(error, arguments)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # `instantstart ls | head`: the reader has closed the pipe.
        return terminal.discard_output(sys.stdout, 141)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            raise
        print(f"instantstart: cannot write: {error.strerror}", file=sys.stderr)
        return terminal.discard_output(sys.stdout, 1)
    return status if isinstance(status, int) else 0


def _fail(error: InstantStartError, arguments: list[str]) -> int:
    terminal.flush()  # what was said before it comes first
    with contextlib.suppress(OSError):
        print(terminal.wrapped(f"instantstart: {error.message}", sys.stderr), file=sys.stderr)
        if terminal.wants_json(arguments):
            terminal.print_json_error(error.code, error.message)
    return 2 if isinstance(error, UsageError) else 1


if __name__ == "__main__":
    main()
