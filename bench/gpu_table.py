"""The table of bench/gpu.py, from what gpu.json holds, however much that is: a part that was cut off shows what it had.

Pure: a dict in, rows of words out. It measures nothing, and decides no exit status. Of a run that was killed before it
printed its table, or of an old one:

    python bench/gpu_table.py FILE       FILE: a gpu.json
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator, Mapping
from typing import Any

MIB = 1024 * 1024
GIB = 1024 * MIB
SHARE = 0.9
"""Of min(ceiling of the disk or of copies in memory, host to device): what the built-in backend is to reach."""
PLAIN = 0.95
"""Of a plain directory's rate: what load_file is to reach on the mount."""
HELD = "taken when all was held, mount, warm"
HOLD_SECONDS = 0.3
"""In which 8 GiB are to be taken over from a hold that has them in place."""
BUILT_IN = "8 readers, 8 MiB, 2 buffers each"
RIVALS = ("fastsafetensors", "runai streamer", "instanttensor")

Row = tuple[str, str]


def lines(result: Mapping[str, Any]) -> list[str]:
    """The whole table, a line each: the figures of each part, then what was missed, not run, and failed."""
    text, missed = list[str](), list[str]()
    for part, found in result.get("parts", {}).items():
        shown = rows(part, found)
        text += [part, *(f"  {name:<44} {value}" for name, value in shown)] if shown else []
        missed += [f"{part}: {name}: {value}" for name, value in shown if "MISSED" in value]
    for title, said in (
        ("targets missed", missed),
        ("not run", result.get("not_run", [])),
        ("failed", result.get("failed", [])),
    ):
        text.append(f"{title}:" if said else f"{title}: nothing")
        text += [f"  {line}" for line in said]
    return text


def rows(name: str, part: Mapping[str, Any]) -> list[Row]:
    """(what, figure) of as much of a part as there is."""
    found: list[Row] = []
    try:
        for row in _OF.get(name, _nothing)(name, part):
            found.append(row)  # one by one: what comes before half a figure is shown
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        if "failed" not in part:
            found.append(("the rest", f"cannot be shown: {type(error).__name__}: {error}; it is in gpu.json"))
    return found


def medians(samples: Mapping[str, Mapping[str, list[float]]]) -> dict[str, dict[str, float]]:
    """Temperature → contender → the middle of its rates."""
    return {
        temperature: {who: round(statistics.median(values), 4) for who, values in found.items()}
        for temperature, found in samples.items()
    }


def ceiling(middle: Mapping[str, Mapping[str, float]], temperature: str, h2d: float) -> tuple[float, str]:
    """What bounds a load: the best of the ceilings of its source, or the copies to the device; and its name."""
    best = max((rate for who, rate in middle.get(temperature, {}).items() if who.startswith("ceiling")), default=0.0)
    source = "disk" if temperature == "cold" else "copy in memory"
    return (min(best, h2d), f"min({source}, host to device)") if best else (0.0, "")


def target(value: float, least: float) -> str:
    return f"{value:.2f}, the target of {least} is {'met' if value >= least else 'MISSED'}"


# -- the parts ---------------------------------------------------------------------------------------------------------


def _nothing(_: str, __: Mapping[str, Any]) -> Iterator[Row]:
    return iter(())


def _environment(_: str, part: Mapping[str, Any]) -> Iterator[Row]:
    cuda = f"CUDA {part['cuda']}" if part.get("cuda") else "no CUDA"
    driver = f", driver {part['driver']}" if part.get("driver") else ""
    link = f", {part['link']}" if part.get("link") else ""
    mode = "".join(f", {title} {part[key]}" for key, title in (("compute_mode", "mode"), ("mig", "MIG")) if key in part)
    yield "device", f"{part['device']}, {part['memory_gib']} GiB{link}{driver}{mode}"
    yield "software", f"torch {part['torch']} ({cuda}), Python {part['python']}, Linux {part['kernel']}"
    memory = f", {part['host_gib']} GiB of memory" if "host_gib" in part else ""
    yield "machine", f"{part['cores']} cores{memory}, {part['filesystem']} with {part['disk_free_gib']} GiB free"


def _checkpoint(_: str, part: Mapping[str, Any]) -> Iterator[Row]:
    yield "checkpoint", f"{part['bytes'] / 1e9:.2f} GB in {part['shards']} files, written at {part['write_gb_s']} GB/s"


def _gds(_: str, part: Mapping[str, Any]) -> Iterator[Row]:
    yield "GPUDirect Storage", f"{'available' if part['native'] else 'not available'}: {part['reason']}"


def _equality(_: str, part: Mapping[str, Any]) -> Iterator[Row]:
    if "equal_bytes" in part:
        yield "every byte equal", f"{part['equal_bytes'] / 1e9:.2f} GB by {part['backend']}, through CUDA IPC"


def _speed(name: str, part: Mapping[str, Any]) -> Iterator[Row]:
    samples = part.get("samples", {})
    middle = medians(samples)
    for temperature in ("cold", "warm"):
        for who, rate in sorted(middle.get(temperature, {}).items(), key=lambda item: -item[1]):
            values = samples[temperature][who]
            count = f"{len(values)} round{'s' if len(values) > 1 else ''}"
            yield f"{temperature} {who}", f"{rate:.2f} GB/s ({min(values):.2f}–{max(values):.2f}, {count})"
    for who, why in part.get("problems", {}).items():
        if not why.startswith("was refused"):  # that is among what was not run
            yield f"not measured: {who}", why
    if h2d := part.get("h2d_ceiling"):
        yield "ceiling: page-locked memory to the device", f"{h2d:.2f} GB/s"
    for temperature in ("cold", "warm"):
        ours = middle.get(temperature, {}).get("direct")
        if ours is None:
            continue
        if name == "rivals":
            for who, rate in middle[temperature].items():
                if who.startswith(RIVALS):
                    yield f"{temperature} direct ÷ {who}", target(ours / rate, 1.0)
        elif h2d:
            most, called = ceiling(middle, temperature, h2d)
            if most:
                yield f"{temperature} direct ÷ {called}", target(ours / most, SHARE)


def _sweep(_: str, part: Mapping[str, Any]) -> Iterator[Row]:
    for temperature in ("warm", "cold"):
        middle = {who: statistics.median(values) for who, values in part.get(temperature, {}).items()}
        if middle:
            best = max(middle, key=lambda who: middle[who])
            ours = f"{middle[BUILT_IN]:.2f} GB/s" if BUILT_IN in middle else "not measured"
            row = f"{middle[best]:.2f} GB/s: {best}; built in ({BUILT_IN}): {ours}"
            yield f"fastest of {len(middle)} settings, {temperature}", row
    refused: Mapping[str, str] = part.get("refused", {})
    for why in dict.fromkeys(refused.values()):
        settings = [name for name, reason in refused.items() if reason == why]
        yield f"refused: {len(settings)} settings", f"{settings[0]}{', …' if len(settings) > 1 else ''}: {why}"


def _page_locking(_: str, part: Mapping[str, Any]) -> Iterator[Row]:
    for kind, measured in part.items():
        if not isinstance(measured, list):
            continue
        good = [each for each in measured if "lock_gb_s" in each]
        refused = [each for each in measured if "refused" in each]
        if good:
            last = good[-1]
            row = f"{last['lock_gb_s']:.2f} GB/s at {last['mib']} MiB, copies out of it {last['h2d_gb_s']:.2f} GB/s"
            yield f"page-locking, {kind}", row
        if refused:
            yield f"page-locking, {kind}, {refused[0]['mib']} MiB", f"refused: {refused[0]['refused']}"


def _startup(_: str, part: Mapping[str, Any]) -> Iterator[Row]:
    for name, title in (
        ("torch", "until torch is imported"),
        ("torch, context", "until a context is made"),
        ("torch, context, ring", "until the ring is made: a worker's start"),
    ):
        if name in part:
            yield title, f"{part[name]:.2f} s"
    if "driver, whole process" in part and "missing" not in part.get("driver", {}):
        yield "all that by the driver's interface, no torch", f"{part['driver, whole process']:.2f} s"


def _handover(name: str, part: Mapping[str, Any]) -> Iterator[Row]:
    if "peak_above_contexts" in part:
        above, ratio = part["peak_above_contexts"], part["peak_above_contexts"] / part["weights"]
        yield f"peak memory, {name}", f"{above / GIB:.2f} GiB above idle contexts, {ratio:.3f} × the weights"


def _renumbered(_: str, part: Mapping[str, Any]) -> Iterator[Row]:
    if "visible" in part:
        yield "hand-over to another numbering", f"equal: {part['visible']} is cuda:{part['number_there']} there"


def _mount(_: str, part: Mapping[str, Any]) -> Iterator[Row]:
    if "transport" in part:
        filled = f", filled at {part['fill_gb_s']} GB/s" if "fill_gb_s" in part else ""
        yield "the mount", f"by {part['transport']}{filled}"
    samples: Mapping[str, list[Mapping[str, Any]]] = part.get("samples", {})
    middle = {name: statistics.median(each["load"] for each in taken) for name, taken in samples.items()}
    for name, load in middle.items():
        whole = statistics.median(each["whole"] for each in samples[name])
        rate = part["bytes"] / load / 1e9
        yield name, f"{rate:.2f} GB/s, load {load:.2f} s, from its process's start {whole:.2f} s"
    if held := middle.get(HELD):
        least = HOLD_SECONDS * part["bytes"] / (8 * GIB)
        met = "met" if held <= least else "MISSED"
        yield f"{HELD}: seconds", f"{held:.3f} s, the target of {least:.3f} s (0.3 s for 8 GiB) is {met}"
    for name, share in mount_of_plain(part).items():
        yield f"{name}: mount ÷ plain", target(share, PLAIN) if "load_file" in name else f"{share:.2f}"
    for name, why in part.get("problems", {}).items():
        yield f"not measured: {name}", (why.splitlines() or [""])[0]


def mount_of_plain(part: Mapping[str, Any]) -> dict[str, float]:
    """Loader and temperature → the mount's rate as a share of the plain directory's."""
    middle = {
        name: statistics.median(each["load"] for each in taken) for name, taken in part.get("samples", {}).items()
    }
    return {
        name.replace(", mount", ""): round(middle[plain] / load, 3)
        for name, load in middle.items()
        if ", mount," in name and (plain := name.replace(", mount,", ", plain,")) in middle
    }


def _killed(name: str, part: Mapping[str, Any]) -> Iterator[Row]:
    if "freed_after" in part:
        row = f"said after {part['said_after']:.2f} s, memory back after {part['freed_after']:.2f} s more"
        yield f"worker {name}", row
    if "late_close" in part:
        yield "closing memory after its owner's end", part["late_close"]


def _receiver(_: str, part: Mapping[str, Any]) -> Iterator[Row]:
    if "file_freed_after" in part:
        row = f"the file's memory back after {part['file_freed_after']:.2f} s"
        yield "receiver killed, a second one done", f"{row}, all {part['freed_after']:.2f} s after the stage"


def _owner(_: str, part: Mapping[str, Any]) -> Iterator[Row]:
    if "freed_after" in part:
        yield "owner of the stage killed", f"memory back after {part['freed_after']:.2f} s"


def _too_big(_: str, part: Mapping[str, Any]) -> Iterator[Row]:
    for said in part.get("said", [])[-1:]:
        yield "does not fit", f"refused before allocating: {said}"


def _lying(_: str, part: Mapping[str, Any]) -> Iterator[Row]:
    if "said" in part:
        yield "a header that lies", f"refused: {part['said']}"


def _several(_: str, part: Mapping[str, Any]) -> Iterator[Row]:
    if "loading" in part:
        rate = sum(part["bytes"].values()) / max(part["loading"].values()) / 1e9
        yield f"{len(part['loading'])} devices", f"{rate:.2f} GB/s in all"


def _peers(_: str, part: Mapping[str, Any]) -> Iterator[Row]:
    if rates := part.get("copies_gb_s"):
        yield "copies between GPUs", f"{min(rates.values()):.1f}–{max(rates.values()):.1f} GB/s"
    if "opened_on" in part:
        row = f"{part['taken_on_the_owner'] / MIB:.0f} MiB more there, seen from cuda:{part['opened_on']}"
        yield "memory of cuda:1 opened from cuda:0", row


def _releases(_: str, part: Mapping[str, Any]) -> Iterator[Row]:
    if "given" in part:
        yield f"torch {part['here']} → {part['there']}", part["given"]
    if "taken" in part:
        yield f"torch {part['there']} → {part['here']}", part["taken"]


_OF = {
    "environment": _environment,
    "checkpoint": _checkpoint,
    "gds probe": _gds,
    "equality": _equality,
    "speed": _speed,
    "sweep": _sweep,
    "page-locking": _page_locking,
    "startup": _startup,
    "hand-over by share": _handover,
    "hand-over by copy": _handover,
    "hand-over to another numbering of devices": _renumbered,
    "mount": _mount,
    "killed while loading": _killed,
    "killed when loaded": _killed,
    "killed while another has it open": _killed,
    "receiver killed": _receiver,
    "owner killed": _owner,
    "too big": _too_big,
    "lying header": _lying,
    "several devices": _several,
    "peers": _peers,
    "two releases of torch": _releases,
    "rivals": _speed,
}


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        print("\n".join(lines(json.load(file))))
