"""Passes a command's output on as it comes, and reads it: the engine's phases, and the user's pattern. In threads."""

from __future__ import annotations

import os
import threading
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection

    from instantstart_fs.startup.pattern import Pattern
    from instantstart_fs.startup.start import Start

DRAIN_SECONDS = 5.0
"""Seconds for which the output of what the command has left behind is still passed on."""
LINE = 65536


class Listening:
    """The command's output, passed on as it comes, and read. What goes to a terminal is left alone, unless somebody
    asked for a word of it: an engine that sees a pipe writes another way."""

    def __init__(self, start: Start) -> None:
        from instantstart_fs.core.enginelog import EngineLog

        self.log = EngineLog(start.engine.name if start.engine is not None else "")
        self.matched = threading.Event()
        self._warn = start.warn
        self._pattern: Pattern | None = None
        if start.options.ready_log:
            from instantstart_fs.startup.pattern import Pattern

            try:
                self._pattern = Pattern(start.options.ready_log, self.matched.set, start.warn)
            except OSError as error:
                self._not_looked_for(error)
        self.streams: dict[int, int] = {}
        """Descriptor of the command's → our end of its pipe."""
        self._reads: dict[int, int] = {}
        self._threads: list[threading.Thread] = []
        for stream in (1, 2):
            if self._pattern is None and (not self.log.listens or _is_terminal(stream)):
                continue
            if not os.get_inheritable(stream):
                continue  # it was closed (cli/terminal.py): the command shall find it closed
            try:
                read, write = os.pipe2(os.O_CLOEXEC)
            except OSError as error:
                self._not_heard(stream, error)
                continue
            self.streams[stream], self._reads[stream] = write, read

    def listen(self) -> None:
        """Begin to listen, before the command has its ends: a pipe that nobody reads would stop it. Where there can
        be no thread, the stream is left alone."""
        for stream in list(self.streams):
            thread = threading.Thread(target=self._pass_on, args=(stream,), name=f"output {stream}", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                os.close(self.streams.pop(stream))
                os.close(self._reads.pop(stream))
                self._not_heard(stream, error)
                continue
            self._threads.append(thread)

    def begin(self, mask: Collection[int]) -> None:
        """Begin to look for the pattern, once the command has its ends. ``mask``: the signals that are blocked in
        the command."""
        for write in self.streams.values():
            os.close(write)
        if self._pattern is not None:
            try:
                self._pattern.begin(mask)
            except (OSError, RuntimeError) as error:
                self._pattern = None
                self._not_looked_for(error)

    def _not_looked_for(self, error: Exception) -> None:
        self._warn(f"--ready-log: it is not looked for: {getattr(error, 'strerror', None) or error}")

    def _not_heard(self, stream: int, error: Exception) -> None:
        self._warn(f"output {stream} is not looked at: {getattr(error, 'strerror', None) or error}")

    def drain(self) -> None:
        """The command has ended."""
        end = time.monotonic() + DRAIN_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        if self._pattern is not None:
            self._pattern.end()

    def end(self) -> None:
        """Stop matching: nobody asks any more whether the pattern was matched."""
        if self._pattern is not None:
            self._pattern.kill()

    def _pass_on(self, stream: int) -> None:
        read, rest = self._reads[stream], b""
        while True:
            data = os.read(read, LINE)
            if not data:
                break
            view = memoryview(data)
            try:
                while view:
                    view = view[_write(stream, view) :]
            except OSError:
                os.close(read)  # nobody reads it any more: the command finds out as it would without us
                return
            lines = (rest + data).split(b"\n")
            rest = lines.pop()[-LINE:]
            for line in lines:
                self._hear(line)
        self._hear(rest)

    def _hear(self, line: bytes) -> None:
        self.log.line(line.decode("utf-8", "replace"))
        pattern = self._pattern
        if pattern is not None and not self.matched.is_set():
            pattern.hear(line)


def _write(stream: int, view: memoryview) -> int:
    """Also where somebody made the stream non-blocking: it is shared with the program that started us."""
    while True:
        try:
            return os.write(stream, view)
        except BlockingIOError:
            import select

            select.select([], [stream], [])


def _is_terminal(stream: int) -> bool:
    try:
        return os.isatty(stream)
    except OSError:
        return False
