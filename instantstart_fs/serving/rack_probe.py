"""Tries the rack level from this host, as `instantstart doctor` shows it: asks each living host of the rack for a chunk
that nobody has. Only who shares the region's key, the storage's clock and the host's name answers 404. Blocks.
"""

from __future__ import annotations

import http.client
import time
from typing import Literal, NamedTuple

from instantstart_fs.config.sections import RegionalConfig
from instantstart_fs.core import rack
from instantstart_fs.core.addresses import split_address
from instantstart_fs.filler.region_settings import region_settings
from instantstart_fs.ipc.attempts import Attempt
from instantstart_fs.ipc.sockets import listen_tcp
from instantstart_fs.regional.hygiene import now_of
from instantstart_fs.regional.racks import RackReader
from instantstart_fs.serving.rack_server import default_address

ASK_SECONDS = 10.0
"""For one host's answer; all are asked at once."""
NOBODYS = rack.Asked("0" * 32, "0" * 32, 0, 0.0, True)
_SAYS = {
    403: "it refuses this host's ticket: another key, another host's name, or another storage's clock",
    503: "it is busy, or its tier does not tell it the clock",
}


class RackHost(NamedTuple):
    """``problem``: why it gives nothing, "" where it would."""

    name: str
    address: str
    problem: str


class RackProbe(NamedTuple):
    """``own``: this host as it has told the rack, None where it has not."""

    own: RackHost | None
    neighbours: tuple[RackHost, ...]


def probe_rack(config: RegionalConfig) -> RackProbe:
    """Ask all hosts that live. Raises InstantStartError where the tier, or the key, is not to be had."""
    settings = region_settings(config)
    store, key = settings.stores[0], settings.key
    now = now_of(store)
    living = RackReader(store, key, settings.rack).read("", now).hosts
    end = time.monotonic() + ASK_SECONDS
    asked = [
        (name, address, Attempt(lambda name=name, address=address: _ask(key.tickets, name, address, now)))  # type: ignore[misc]
        for name, address in sorted(living.items())
    ]
    found = [RackHost(name, address, _answer(attempt, end)) for name, address, attempt in asked]
    own = next((host for host in found if host.name == config.host), None)
    return RackProbe(own, tuple(host for host in found if host is not own))


def finding(config: RegionalConfig, probe: RackProbe, running: bool) -> tuple[Literal["ok", "warn", "fail"], str, str]:
    """How the rack level is, what is found, and what to do. ``running``: whether this host's daemon
    is known to."""
    own, neighbours = probe
    if own is not None and not own.problem:
        here = f"answers at {own.address}"
    elif not running:
        problem = _listen_problem(config.rack_listen)
        if problem:
            return "fail", problem, "free that port, or set regional.rack_listen"
        here = "no daemon answers here yet, and could"
    elif own is None:
        advice = "it tells within seconds after its start; see its log for the rack"
        return "warn", "the daemon has not told its neighbours where it answers", advice
    else:
        advice = "neighbours get nothing from this host: see the daemon's log; no two hosts may have one regional.host"
        return "fail", f"at {own.address}: {own.problem}", advice
    silent = [host for host in neighbours if host.problem]
    if silent:
        first = f"{silent[0].name} at {silent[0].address}: {silent[0].problem}"
        more = f" (and {len(silent) - 1} more)" if len(silent) > 1 else ""
        answer = f"{len(neighbours) - len(silent)} of {len(neighbours)} neighbours answer; {first}{more}"
        advice = "what these own comes from the tier; open the port of rack_listen between the hosts of the rack"
        return "warn", f"{here}; {answer}", advice
    if not neighbours:
        return "warn", f"{here}; no other host of the rack lives", "hosts of a rack have one regional.rack, url and key"
    return "ok", f"{here}; all {len(neighbours)} neighbours answer, with this key and clock", ""


def _listen_problem(listen: tuple[str, int]) -> str:
    """Why a daemon could not answer its rack there; "" where it could. Binds the port for a moment."""
    host, port = listen[0] or default_address() or "", listen[1]
    if not host:
        return "this host has no default route"
    try:
        listen_tcp(host, port).close()
    except OSError as error:
        return f"{host} port {port}: {error.strerror or error}"
    return ""


def _ask(key: bytes, name: str, address: str, now: float) -> str:
    where = split_address(address)
    if where is None:
        return "no address"
    connection = http.client.HTTPConnection(*where, timeout=ASK_SECONDS)
    try:
        ticket = rack.make_ticket(key, name, NOBODYS, now)
        connection.request("GET", rack.path_of(NOBODYS), headers={"Authorization": ticket})
        status = connection.getresponse().status
    except TimeoutError:
        return f"no answer within {ASK_SECONDS:g} s"
    except OSError as error:
        return error.strerror or str(error) or type(error).__name__
    except http.client.HTTPException:
        return "what answers is no host of a rack"
    finally:
        connection.close()
    return "" if status == 404 else _SAYS.get(status, f"what answers is no host of a rack (HTTP {status})")


def _answer(attempt: Attempt[str], end: float) -> str:
    try:
        return attempt.result(end - time.monotonic())
    except TimeoutError:
        return f"no answer within {ASK_SECONDS:g} s"
