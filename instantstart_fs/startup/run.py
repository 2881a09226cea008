"""`instantstart run`: a replica's start, from the first word of the command line to the engine's exit.

    ask the daemon        one connection: what there is to restore; the fill begins; the lease, until this process ends
    restore               into a private directory, named to the engine by its own variables
    start the command     nothing after this can keep it from running
    then, in threads      watch it become ready; stage; report; keep what was compiled

Whatever goes wrong with caches, marks or probes is said in one line on stderr, and the engine runs as it would without.
Only a pipeline that is not there, or a daemon that does not come, keeps the command from being started.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time

from instantstart_fs.config.places import find_socket
from instantstart_fs.core.enginetable import LAYOUTS, Engine, engine_named, engine_of
from instantstart_fs.core.startuppack import BadPack
from instantstart_fs.errors import (
    DaemonUnreachable,
    InstantStartError,
    PermissionRefused,
    PipelineNotFound,
    UsageError,
)
from instantstart_fs.startup.options import Options
from instantstart_fs.startup.pack import unpack
from instantstart_fs.startup.start import Start
from instantstart_fs.startup.supervise import Command, Interrupted
from instantstart_fs.startup.surroundings import key_of
from instantstart_fs.startup.views import NoView, base_directory, take_view
from instantstart_fs.startup.wire import ANSWER_SECONDS, Wire

USER_LAYOUT = "user-"
"""The prefix of the number of a directory that the user named."""
TRIES = 2
"""Versions that are tried before a start is a cold one."""
BEGIN_SECONDS = 15.0
"""For which the daemon may be silent when it is asked for a startup cache; then the start goes on without."""
BEGIN_AT_MOST = 75.0
"""For which it may say that it still looks (the region's pack comes: serving.startupcaches.OFFER_SECONDS)."""


def run(options: Options) -> int:
    """The exit status. Raises UsageError, and what keeps the daemon from giving a lease."""
    start = Start(options, _engine(options))
    start.socket = find_socket(options.socket or None)
    check(options)
    _remove_old_report(options.report)
    command = Command()
    try:
        wire = _prepare(start)
        from instantstart_fs.startup import follower
        from instantstart_fs.startup.output import Listening

        listening = Listening(start)
        command.block()
        listening.listen()
    except BaseException as error:
        command.block()
        _give_up(start)
        if isinstance(error, Interrupted):
            _report_refused(start, 128 + error.number, "a signal ended the start before its command ran")
            return 128 + error.number
        command.release()  # the advice may wait for the daemon, and ^C ends that
        if isinstance(error, PipelineNotFound):
            from instantstart_fs.control.client import Client, with_advice

            with contextlib.suppress(InstantStartError, OSError), Client(start.socket) as client:
                error = with_advice(client, error, start.pipeline)
        _report_refused(start, None, getattr(error, "message", "") or f"{type(error).__name__}: {error}")
        raise error
    inherited = (start.view.descriptor,) if start.view is not None else ()
    status = command.start(options.command, start.environment, listening.streams)
    start.spawned = time.monotonic()
    for descriptor in inherited:
        os.set_inheritable(descriptor, False)
    if status:
        _give_up(start)
        _report_refused(start, status, f"{options.command[0]} cannot be run")
        return status
    beside = follower.Follower(start, command, listening, wire)
    beside.begin()
    status = command.wait()
    return beside.end(status)


def _prepare(start: Start) -> Wire:
    """All that is done before the command; the connection that has the lease. Raises PipelineNotFound,
    PermissionRefused, and DaemonUnreachable where no daemon gives the lease."""
    wire = Wire(start.socket, say=start.warn)
    _prepare_view(start)
    try:
        _restore(start, wire)
    except (PipelineNotFound, PermissionRefused):
        wire.close()
        raise
    except Exception as error:
        # A daemon of another release, one that just ended, an index that cannot be read, an answer of another shape:
        # what it could say of caches is no reason not to start.
        said = error.message if isinstance(error, InstantStartError) else f"{type(error).__name__}: {error}"
        start.do_without(f"no startup cache: {said}")
        wire.close()
        wire = Wire(start.socket, say=start.warn)
    if start.outcome == "not-owner":
        start.leave_view()  # nothing of it would be kept
    waits = _Once(start, f"waits for the daemon, which is asked for a lease, {2 * ANSWER_SECONDS:g} s at most")
    try:
        wire.ask("lease", pipeline=start.pipeline, waits=waits)
    except DaemonUnreachable:  # it is being restarted
        wire.close()
        wire = Wire(start.socket, say=start.warn)
        try:
            wire.ask("lease", pipeline=start.pipeline, waits=waits)
        except BaseException:
            wire.close()
            raise
    except BaseException:
        wire.close()
        raise
    return wire


def check(options: Options) -> None:
    """Raises UsageError for what would only show later, and for what is no pipeline's id: it names a directory of
    ours, whose old contents are deleted."""
    if not options.pipeline or "/" in options.pipeline or options.pipeline.startswith("."):
        raise UsageError(
            f"{options.pipeline!r} cannot be a pipeline's id; `instantstart ls` lists those that there are"
        )
    if options.ready_log:
        import re

        try:
            re.compile(options.ready_log)
        except re.error as error:
            raise UsageError(f"--ready-log: {options.ready_log!r} is no regular expression: {error}") from error
    for name, url in (("--ready-url", options.ready_url), ("--probe", options.probe)):
        if url and url != "auto" and not url.startswith(("http://", "https://")):
            raise UsageError(f"{name}: {url!r} is no http:// or https:// address")
    for name in options.caches:
        if not (name.startswith("/") or name.replace("_", "a").isalnum()):
            raise UsageError(f"--cache: {name!r} is neither a variable's name nor an absolute path")
    if options.report and not os.path.isdir(os.path.dirname(options.report) or "."):
        raise UsageError(f"--report: {os.path.dirname(options.report)} is no directory")
    if options.ready_timeout:
        from instantstart_fs.config.units import option, parse_duration

        option("--ready-timeout", parse_duration, options.ready_timeout)
    if options.requested_at:
        from instantstart_fs.config.units import parse_time

        parse_time(options.requested_at)


def _engine(options: Options) -> Engine | None:
    """Return the engine that the options or the command name. Raises UsageError."""
    if not options.engine:
        return engine_of(options.command)
    if options.engine == "none":
        return None
    found = engine_named(options.engine)
    if found is None:
        from instantstart_fs.core.enginetable import ENGINES
        from instantstart_fs.core.humanize import did_you_mean

        names = [*(engine.name for engine in ENGINES), "none"]
        meant = did_you_mean(options.engine, names)
        raise UsageError(f"--engine: {options.engine!r} is none of {', '.join(names)}{meant}")
    return found


def _prepare_view(start: Start) -> None:
    """A private directory, and the variables that lead the engine to it. Those that the user has set stay."""
    options = start.options
    if options.no_restore and options.no_save:
        return
    try:
        view = start.view = take_view(start.pipeline, options.cache_dir or base_directory())
    except NoView as error:
        start.warn(f"no startup caches: {error}")
        return
    named = [(layout.name, layout.variable, layout.skip) for layout in LAYOUTS]
    named += [(f"{USER_LAYOUT}{at}", name, ()) for at, name in enumerate(options.caches, 1)]
    theirs = [variable for _, variable, _ in named if start.environment.get(variable)]
    for name, variable, skip in named:
        path = os.path.join(view.path, name)
        if variable in theirs:
            continue  # the user's own choice: it is neither restored nor saved
        try:
            os.makedirs(path, 0o700, exist_ok=True)
            if variable.startswith("/"):
                view.link(variable, name)
        except OSError as error:
            start.warn(f"{variable}: left alone, neither restored nor kept: {error.strerror or error}")
            continue
        if not variable.startswith("/"):
            start.environment[variable] = path
            start.led[name] = variable
        start.layouts[name] = skip
    if theirs:
        start.say(
            f"set already, and left alone: {', '.join(theirs)}; what lies there is neither restored nor kept. "
            "Without the variable it is"
        )


def _restore(start: Start, wire: Wire) -> None:
    """Ask for a startup cache and put it in place. Raises what makes the start pointless: no such pipeline."""
    options = start.options
    try:
        start.key = key_of(options.command, start.engine, start.environment, options.caches)
    except Exception as error:
        why = error.message if isinstance(error, UsageError) else f"{type(error).__name__}: {error}"
        start.warn(f"no startup caches: what they depend on cannot be found out: {why}")
        start.leave_view()
    restore = bool(start.layouts) and not options.no_restore
    damaged: list[int] = []
    waits = _Once(start, f"waits for the daemon, which looks for a startup cache, {BEGIN_AT_MOST:g} s at most")
    for _ in range(TRIES):
        answer = wire.ask(
            "startup-begin",
            pipeline=start.pipeline,
            key=start.key,
            restore=restore,
            without=damaged,
            start=start.identity,
            requested_ns=_requested_ns(options),
            seconds=BEGIN_SECONDS,
            at_most=BEGIN_AT_MOST,
            waits=waits,
        )
        start.identity, start.generation = str(answer["start"]), str(answer["generation"])
        start.mount, start.outcome = str(answer["mount"]), str(answer["outcome"])
        start.differs = tuple(answer["differs"])
        if answer["warning"]:
            start.warn(str(answer["warning"]))
        record = answer["record"]
        descriptors, wire.descriptors = wire.descriptors, []
        if record is None or not descriptors:
            break
        began = time.monotonic()
        try:
            assert start.view is not None
            start.seen = unpack(
                descriptors[0], record["size"], record["digest"], start.view.path, start.layouts.__contains__
            )
            start.restored, start.restore_seconds = record, time.monotonic() - began
            start.saved = start.seen if set(record["layouts"]) == set(start.layouts) else {}
            break
        except (BadPack, OSError, ValueError) as error:
            start.outcome = "damaged" if isinstance(error, BadPack) else "failed"
            start.warn(f"startup cache {record['number']} is not used: {getattr(error, 'strerror', None) or error}")
            if not _start_over(start) or start.outcome == "failed":
                break
            damaged.append(int(record["number"]))
        finally:
            for descriptor in descriptors:
                os.close(descriptor)


def _start_over(start: Start) -> bool:
    """Empty the view of what was half put in place; without that it is not used at all."""
    assert start.view is not None
    start.seen = {}
    try:
        start.view.empty()
        for name in start.layouts:
            os.makedirs(os.path.join(start.view.path, name), 0o700, exist_ok=True)
    except OSError:
        start.leave_view()
        return False
    return True


def _requested_ns(options: Options) -> int | None:
    given = options.requested_at or os.environ.get("INSTANTSTART_REQUESTED_AT", "")
    if not given:
        return None
    from instantstart_fs.config.units import parse_time

    with contextlib.suppress(UsageError):
        return parse_time(given)
    return None


class _Once:
    """Says something the first time that it is called."""

    def __init__(self, start: Start, text: str) -> None:
        self._start = start
        self._text = text

    def __call__(self) -> None:
        if self._text:
            self._start.say(self._text)
        self._text = ""


def _remove_old_report(path: str) -> None:
    """Of an earlier start: whoever waits for this one's must not take it."""
    with contextlib.suppress(OSError):
        if path and stat.S_ISREG(os.lstat(path).st_mode):
            os.unlink(path)


def _report_refused(start: Start, status: int | None, why: str) -> None:
    """Write the report of a start whose command did not run. Never raises."""
    if not start.options.report:
        return
    try:
        from instantstart_fs.startup import report

        report.write(start, {}, {}, None, start.options.report, status=status, why=why)
    except Exception as error:
        start.warn(f"--report: {start.options.report}: {getattr(error, 'strerror', None) or error}")


def _give_up(start: Start) -> None:
    if start.view is not None:
        start.view.remove()
