"""What `run` does beside the command once that runs: pass its output on and listen to it, watch it become ready, stage
its weights, keep what it has compiled, say where the time went. In threads, none of which can hurt the command.
"""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable

from instantstart_fs.core.enginetable import host_of, port_of
from instantstart_fs.errors import DaemonUnreachable, InstantStartError
from instantstart_fs.startup.views import sweep
from instantstart_fs.startup.wire import Wire

TYPE_CHECKING = False  # the module itself takes 3 ms of every command
if TYPE_CHECKING:
    from typing import Any

    from instantstart_fs.startup.output import Listening
    from instantstart_fs.startup.start import Start
    from instantstart_fs.startup.supervise import Command

UNWATCHED_SECONDS = 60.0
"""A command that nobody watches, and that ends with an error within this, was not ready."""
SAVE_SECONDS = 60.0
"""Seconds that the end waits for a save; a signal ends the wait."""
READY_SECONDS = 3600.0
"""Seconds for which the command is watched, if nobody says otherwise."""
FIRST_POLL, LAST_POLL = 0.05, 0.5
"""Seconds between two looks: close at first, since small engines are quick."""
REQUEST_SECONDS = 2.0
PROBE_SECONDS = 120.0
LEASE_RETRY, LAST_LEASE_RETRY = 0.5, 10.0


class Follower:
    """Owned by ``run``; ``begin`` and ``end`` belong on the main thread."""

    def __init__(self, start: Start, command: Command, listening: Listening, lease: Wire) -> None:
        self._start = start
        self._command = command
        self._listening = listening
        self._lease = lease
        self._ended = threading.Event()
        """The command has."""
        self._saving = threading.Lock()
        self._moments: dict[str, int] = {}
        """Wall clock, ns."""
        self._told = False
        self._watch: threading.Thread | None = None

    def begin(self) -> None:
        self._listening.begin(self._command.mask)
        targets = {"lease": self._keep_leased, "watch": self._follow, "stage": self._stage, "sweep": self._sweep}
        for name, target in targets.items():
            thread = threading.Thread(target=self._guarded, args=(name, target), name=name, daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # no thread left: the command runs on
                self._start.warn(f"{name}: {error}")
                continue
            if name == "watch":
                self._watch = thread

    def end(self, status: int) -> int:
        """The command has ended with that status: what is left to be done of it; the status."""
        self._ended.set()
        self._listening.drain()
        clean = status == 0 or self._command.was_asked_to_end(status)
        work = threading.Thread(target=self._guarded, args=("end", lambda: self._finish(status, clean)), daemon=True)
        try:
            work.start()
        except RuntimeError as error:
            self._start.warn(f"end: {error}")
        end = time.monotonic() + SAVE_SECONDS
        while work.is_alive() and time.monotonic() < end:
            work.join(0.02)
            if signal.sigtimedwait({signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP}, 0) is not None:
                break
        self._listening.end()
        self._start.given_up = True
        if self._start.view is not None:
            self._start.view.remove()
        return status

    def _finish(self, status: int, clean: bool) -> None:
        if self._watch is not None:
            self._watch.join(REQUEST_SECONDS)
        watched = self._watches
        if status == 0 and not watched and "ready" not in self._moments:
            self._mark("ready")
        lived = time.monotonic() - self._start.spawned
        failed = status != 0 and not self._command.asked_by and "ready" not in self._moments
        # Of a command that nobody watches it is not known whether it was ready; one that ends at once was not.
        self._report(ended=True, status=status, failed=failed and (watched or lived < UNWATCHED_SECONDS))
        why = ""
        if "ready" not in self._moments:
            from instantstart_fs.core.humanize import precise_seconds

            took = precise_seconds(lived)
            why = f"the command ended with status {status} after {took}"
            why += ", and was not ready before" if watched else ""
            if watched and not clean:
                self._start.say(why)
        self._tell(status, why)
        if clean and "ready" in self._moments:
            self._save()

    def _guarded(self, name: str, work: Callable[[], None]) -> None:
        """Do ``work``, and log its errors: none of ours is the command's."""
        try:
            work()
        except InstantStartError as error:
            self._start.warn(f"{name}: {error.message}")
        except Exception as error:
            self._start.warn(f"{name}: {type(error).__name__}: {error}")

    # -- lease -----------------------------------------------------------------------------------------------------

    def _keep_leased(self) -> None:
        """A restart of the daemon ends the lease, and not the command: take it again. Ends with the process."""
        wire = self._lease
        while True:
            wire.wait_disconnected()
            pause = LEASE_RETRY
            while True:
                time.sleep(pause)
                pause = min(1.5 * pause, LAST_LEASE_RETRY)
                try:
                    wire = Wire(self._start.socket, patience=0.0)
                    wire.ask("lease", pipeline=self._start.pipeline)
                    break
                except InstantStartError:
                    continue  # not back yet; or the pipeline is gone, and may come back

    # -- readiness -------------------------------------------------------------------------------------------------

    @property
    def _watches(self) -> bool:
        options = self._start.options
        return bool(self._url or options.ready_log or options.ready_file)

    @property
    def _url(self) -> str:
        """Return where readiness is asked for: as the user says, else the engine's own address."""
        options, engine = self._start.options, self._start.engine
        if options.ready_url or options.ready_log or options.ready_file or engine is None:
            return options.ready_url
        return f"{self._address}{engine.ready}"

    @property
    def _address(self) -> str:
        engine = self._start.engine
        assert engine is not None
        return f"http://{host_of(self._start.options.command)}:{port_of(self._start.options.command, engine)}"

    def _follow(self) -> None:
        if not self._watches:
            return
        if not self._wait_ready():
            return
        self._mark("ready")
        if self._start.options.probe:
            self._probe()
        self._report(ended=False)
        self._tell()
        self._save()

    def _wait_ready(self) -> bool:
        options, pause = self._start.options, FIRST_POLL
        limit = READY_SECONDS
        if options.ready_timeout:
            from instantstart_fs.config.units import parse_duration

            limit = parse_duration(options.ready_timeout) or float("inf")
        end = self._start.began + limit
        while not self._is_ready():
            if self._ended.wait(pause):
                return False
            if time.monotonic() > end:
                self._start.warn(f"not ready after {limit:g} s: it is watched no longer, and runs on")
                return False
            pause = min(pause * 1.1, LAST_POLL)
        return True

    def _is_ready(self) -> bool:
        options = self._start.options
        if options.ready_log and self._listening.matched.is_set():
            return True
        if options.ready_file:
            with contextlib.suppress(OSError):
                found = os.stat(options.ready_file)
                # One of an earlier start says nothing of this one. Filesystems round to the tick before.
                if stat.S_ISREG(found.st_mode) and found.st_mtime_ns >= self._start.began_ns - 20_000_000:
                    return True
        return bool(self._url) and _answers(self._url)

    # -- the first token -------------------------------------------------------------------------------------------

    def _probe(self) -> None:
        """Send one small request. An address that ends in /completions gets one for a single token; others are read."""
        import json
        import urllib.error
        import urllib.request

        options, engine = self._start.options, self._start.engine
        url = options.probe
        if url == "auto":
            if engine is None:
                self._start.warn("--probe auto: for vllm, sglang and tensorrt-llm; name an address for another engine")
                return
            url = f"{self._address}{engine.completion}"
        body: dict[str, object] | None = None
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            if url.partition("?")[0].endswith("/completions"):
                models = url.partition("?")[0].removesuffix("/completions").removesuffix("/chat") + "/models"
                with opener.open(models, timeout=PROBE_SECONDS) as answer:
                    model = json.load(answer)["data"][0]["id"]
                body = {"model": model, "max_tokens": 1, "temperature": 0}
                if "/chat/" in url:
                    body["messages"] = [{"role": "user", "content": "Hello"}]
                else:
                    body["prompt"] = "Hello"
            request = urllib.request.Request(
                url,
                data=json.dumps(body).encode() if body is not None else None,
                headers={"Content-Type": "application/json"} if body is not None else {},
            )
            with opener.open(request, timeout=PROBE_SECONDS) as answer:
                answer.read()
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            self._start.warn(f"--probe: no first token: {error}")
            return
        self._mark("first-token")

    # -- staging ---------------------------------------------------------------------------------------------------

    def _stage(self) -> None:
        """Bring the weights into the page cache, in load order, while the engine still imports: as each file is whole,
        as long as there is memory for it."""
        if self._start.options.prefetch:
            self._hold()
            return
        if self._start.options.no_stage:
            return
        from instantstart_fs.config.memory import read_memory

        memory = read_memory(active=True)
        left = int(min(memory.available, *memory.cgroups_left, memory.available) * STAGED_SHARE)
        read: set[str] = set()
        while not self._ended.is_set():
            try:
                self._stage_from(Wire(self._start.socket), left, read)
                return
            except DaemonUnreachable:  # it is being restarted: go on where we were
                if self._ended.wait(LEASE_RETRY):
                    return

    def _stage_from(self, wire: Wire, left: int, read: set[str]) -> None:
        """Files but those in ``read``, which it adds to, in at most ``left`` bytes."""
        try:
            wire.send("open", pipeline=self._start.pipeline)
            while not self._ended.is_set():
                message = wire.receive()
                if message.get("type") == "done":
                    return
                for file in message.get("files", ()):
                    # The first is the plain one; what follows is the same file opened O_DIRECT.
                    count = int(file["descriptors"])
                    if file["path"] not in read:
                        left -= self._read_ahead(wire.descriptors[0], left)
                        read.add(file["path"])
                    for descriptor in wire.descriptors[:count]:
                        os.close(descriptor)
                    del wire.descriptors[:count]
        finally:
            wire.close()

    def _read_ahead(self, descriptor: int, most: int) -> int:
        """Read at most so many bytes of a file into the page cache. Returns how many."""
        size, at = os.fstat(descriptor).st_size, 0
        while at < min(size, most) and not self._ended.is_set():
            os.posix_fadvise(descriptor, at, STAGE_BLOCK, os.POSIX_FADV_WILLNEED)
            # Read a byte of it: an advice alone is dropped where the device's queue is full.
            os.pread(descriptor, 1, min(at + STAGE_BLOCK, size) - 1)
            at += STAGE_BLOCK
        return at

    def _hold(self) -> None:
        """`instantstart prefetch PIPELINE --hold` beside the command, for engines that take the weights from there."""
        words = [sys.executable, "-m", "instantstart_fs.cli", "prefetch", "--hold", "--socket", self._start.socket]
        null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        pid = os.posix_spawn(
            sys.executable,
            [*words, "--", self._start.pipeline],
            dict(os.environ),
            file_actions=[(os.POSIX_SPAWN_DUP2, null, 0), (os.POSIX_SPAWN_DUP2, 2, 1)],
            setsigmask=self._command.mask,
        )
        os.close(null)
        self._ended.wait()
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)

    # -- what the daemon is told -----------------------------------------------------------------------------------

    def _ask(self, operation: str, **fields: Any) -> Any:
        wire = Wire(self._start.socket, patience=2.0)
        try:
            return wire.ask(operation, pipeline=self._start.pipeline, **fields)
        finally:
            wire.close()

    def _mark(self, moment: str) -> None:
        self._moments[moment] = time.time_ns()
        try:
            self._ask("mark", moment=moment, at_ns=self._moments[moment], start=self._start.identity)
        except InstantStartError as error:
            self._start.warn(f"mark {moment}: {error.message}")

    def _report(self, *, ended: bool, status: int | None = None, failed: bool = False) -> None:
        start = self._start
        with contextlib.suppress(InstantStartError):
            self._ask(
                "startup-report",
                start=start.identity,
                restore_seconds=round(start.restore_seconds, 6),
                command_after=round(start.spawned - start.began, 6),
                outcome=start.outcome,
                phases={name: round(seconds, 3) for name, seconds in self._listening.log.phases.items()},
                ended=ended or ("first-token" in self._moments) or not start.options.probe,
                status=status,
                failed=failed,
            )

    # -- where the time went ---------------------------------------------------------------------------------------

    def _tell(self, status: int | None = None, why: str = "") -> None:
        """Print the table, of one that was ready, and write the report file, once. ``status`` of a command that has
        ended, ``why`` it never was ready."""
        start = self._start
        if self._told or ((start.options.quiet or why) and not start.options.report):
            return
        self._told = True
        from instantstart_fs.startup import report

        record = None
        try:
            record = report.record_of(start.socket, start.pipeline, start.identity)
        except Exception as error:  # an answer of another release's daemon, say: the rest is known
            start.warn(f"where its time went is not known: {getattr(error, 'message', None) or error}")
        phases = self._listening.log.phases
        for line in () if why else report.lines(start, self._moments, phases, record):
            start.say(line)
        if start.options.report:
            try:
                report.write(start, self._moments, phases, record, start.options.report, status=status, why=why)
            except OSError as error:
                start.warn(f"--report: {start.options.report}: {error.strerror or error}")

    def _sweep(self) -> None:
        if self._start.view is not None:
            with contextlib.suppress(OSError):
                sweep(self._start.view)

    # -- saving ----------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        """Keep what the view has and the store does not. At most one at a time; a failure costs the next start."""
        start = self._start
        if start.view is None or not start.layouts or start.options.no_save or start.outcome == "not-owner":
            return
        from instantstart_fs.startup import save

        with self._saving:
            try:
                saved = save.save(start)
            except (OSError, save.TooMuch) as error:
                start.warn(f"startup cache not saved: {getattr(error, 'strerror', None) or error}")
            except InstantStartError as error:
                start.warn(f"startup cache not saved: {error.message}")
            else:
                if saved is not None:
                    start.say(saved)


STAGED_SHARE = 0.8
"""The share of the free memory that is staged: the engine needs some, too."""
STAGE_BLOCK = 4 * 1024 * 1024


def _answers(url: str) -> bool:
    """Return whether the address answers 200 now."""
    import urllib.request

    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=REQUEST_SECONDS) as answer:
            return bool(answer.status == 200)
    except (OSError, ValueError):
        return False
    except Exception:
        return False  # http.client has errors of its own for what is no HTTP
