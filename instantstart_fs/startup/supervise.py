"""Run one command in our place: what is sent to us reaches it, what becomes of it becomes of us.

Every signal that somebody sends is passed on; one that the terminal sends (Ctrl-C, a resize) has reached the command
already, which is in the same foreground group. Standard input is the command's own. As PID 1 it reaps every
process that is left without a parent.

The exit status is the command's, 128 + N when signal N ended it, 126 or 127 when it cannot be run.

Until there is a command, a signal that asks to end is raised as ``Interrupted``: nothing that we wait for then may keep
us. From then on the main thread waits in ``sigwaitinfo`` with its signals blocked: none comes at a bad time.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Mapping, Sequence

PASSED = frozenset(
    {
        signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH,
        signal.SIGCONT, signal.SIGTSTP, signal.SIGALRM,
    }
)  # fmt: skip
_WAITED = PASSED | {signal.SIGCHLD}
_ENDING = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP})
_DEFAULTS = tuple(
    number for name in ("SIGPIPE", "SIGXFSZ", "SIGXFZ") if (number := getattr(signal, name, None)) is not None
)
"""Python ignores these, and what we start must not inherit that."""


class Interrupted(BaseException):
    """A signal came that asks to end, before the command ran."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Command:
    """A command that runs. Made once, on the main thread, before any other thread: they inherit its blocked signals."""

    def __init__(self) -> None:
        self.mask = signal.pthread_sigmask(signal.SIG_BLOCK, _WAITED - _ENDING)
        self._before = {number: signal.getsignal(number) for number in _ENDING}
        for number, handler in self._before.items():
            if handler is not signal.SIG_IGN:  # nohup: the command is to ignore it, too
                signal.signal(number, self._interrupted)
        self.pid = 0
        self.asked_by: set[int] = set()
        """Signals that ask a process to end, of those that were passed on."""
        self._is_interrupted = False

    def _interrupted(self, number: int, _frame: object) -> None:
        if not self._is_interrupted:  # another one must not end what the first one began
            self._is_interrupted = True
            raise Interrupted(number)

    def was_asked_to_end(self, status: int) -> bool:
        """Whether that exit status is the end that somebody asked for: by the signal itself. An engine that outlived a
        SIGHUP and crashed later ended by itself."""
        return status - 128 in self.asked_by

    def block(self) -> None:
        """Hold signals back until there is a command that they can go to."""
        signal.pthread_sigmask(signal.SIG_BLOCK, _WAITED)

    def release(self) -> None:
        """Leave signals as they were: there will be no command, and the process may go on."""
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, self.mask)

    def start(self, words: Sequence[str], environment: Mapping[str, str], streams: Mapping[int, int]) -> int:
        """Start it; 0, or the status to exit with (and what is wrong was said). ``streams``: which of our descriptors
        become its 1 and 2."""
        actions = [(os.POSIX_SPAWN_DUP2, ours, theirs) for theirs, ours in streams.items()]
        try:
            self.pid = os.posix_spawnp(
                words[0],
                list(words),
                environment,
                file_actions=actions,
                setsigmask=self.mask,
                setsigdef=_DEFAULTS,
            )
        except OSError as error:
            print(f"instantstart: {words[0]}: {error.strerror or error}", file=sys.stderr, flush=True)
            return 127 if error.errno == errno.ENOENT else 126
        return 0

    def wait(self) -> int:
        """Wait until it has ended. Returns its exit status."""
        while True:
            found = signal.sigwaitinfo(_WAITED)
            if found.si_signo == signal.SIGCHLD:
                status = self._reap()
                if status is not None:
                    return status
                continue
            self._pass_on(signal.Signals(found.si_signo), by_kernel=found.si_code > 0)

    def _reap(self) -> int | None:
        """Reap every process that has ended; as PID 1 those are not only ours."""
        ended = None
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return ended
            if pid == 0:
                return ended
            if pid == self.pid:
                code = os.waitstatus_to_exitcode(status)
                ended = code if code >= 0 else 128 - code

    def _pass_on(self, number: signal.Signals, *, by_kernel: bool) -> None:
        if number in _ENDING:
            self.asked_by.add(int(number))
        if not by_kernel:
            try:
                os.kill(self.pid, number)
            except ProcessLookupError:
                return
        if number == signal.SIGTSTP and os.getpid() != 1:
            os.kill(os.getpid(), signal.SIGSTOP)  # our parent sees what it would see of the command
