"""One start of a replica, as `instantstart run` knows it. Values, and a line for people."""

from __future__ import annotations

import contextlib
import os
import sys
import time

from instantstart_fs.core.enginetable import Engine
from instantstart_fs.errors import without_secrets
from instantstart_fs.startup.options import Options
from instantstart_fs.startup.pack import Seen
from instantstart_fs.startup.views import View


class Start:
    """The facts of this start. Times: time.monotonic()."""

    def __init__(self, options: Options, engine: Engine | None) -> None:
        self.options = options
        self.engine = engine
        self.began = time.monotonic()
        self.began_ns = time.time_ns()
        self.spawned = 0.0
        self.environment = dict(os.environ)
        self.key: dict[str, str] = {}
        self.identity = ""
        """The daemon's name of this start."""
        self.generation = ""
        self.mount = ""
        self.outcome = "off"
        self.differs: tuple[str, ...] = ()
        self.restored: dict[str, object] | None = None
        self.restore_seconds = 0.0
        self.view: View | None = None
        self.layouts: dict[str, tuple[str, ...]] = {}
        """Those that have a directory in the view → names in it that are not kept."""
        self.led: dict[str, str] = {}
        """Layout → the variable that was set for it."""
        self.seen: Seen = {}
        """The files that were restored."""
        self.saved: Seen = {}
        """The files of this start that the store has."""
        self.given_up = False
        """The view is being removed: what is read of it now is not whole."""
        self.socket = ""

    @property
    def pipeline(self) -> str:
        return self.options.pipeline

    def do_without(self, why: str) -> None:
        """Neither restore nor save: ``why`` is said."""
        self.warn(why)
        self.outcome = "failed"
        self.leave_view()

    def leave_view(self) -> None:
        """Before the command: it shall use its own directories, as it does without us. Ours would be empty at each
        start, and what it compiles there would be thrown away."""
        self.restored, self.seen, self.saved = None, {}, {}
        self.options.no_save = True
        for variable in self.led.values():
            self.environment.pop(variable, None)
        self.led, self.layouts = {}, {}
        if self.view is not None:
            with contextlib.suppress(OSError):
                self.view.unlink()

    def say(self, text: str) -> None:
        """Print one line, for people."""
        if not self.options.quiet:
            self.warn(text)

    def warn(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            print(without_secrets(f"instantstart: {self.pipeline}: {text}"), file=sys.stderr, flush=True)
