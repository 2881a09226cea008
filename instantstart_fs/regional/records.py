"""What lies in a tier, and how it is read without believing it: chunk objects, seals, claims.

    v1/<slot>/<pin>/c/<chunk>            a chunk: its keyed digest, then its bytes
    v1/<slot>/<pin>/k/<group>.<epoch>    a claim: who pulls a group of chunks
    v1/<slot>/<pin>/seal                 the digests of all chunks, and by whose proof
    v1/<slot>/startup/<key>/<name>       a startup cache (regional/startup.py)
    v1/<slot>/used/<day>                 that it was used that day
    v1/hosts/<host>.<content>            what a host has (regional/heartbeats.py)
    v1/racks/<rack>/<host>.<content>     where it answers its rack (regional/racks.py)

``pin`` names one file as it was pinned (regional/keys.py). Anybody who can write to the bucket can put anything there:
each record carries a MAC over its kind, its name and its body, so that it is worth nothing under another name.
"""

from __future__ import annotations

import hmac
import re
from typing import TypeVar

import msgspec

from instantstart_fs.regional.keys import DIGEST_BYTES, RegionKey

HEADER = DIGEST_BYTES
"""Bytes before a chunk's own."""
MOST_RECORD = 1 << 20
"""The most bytes of a claim or a host's record. A seal may have its digests beyond these."""
_CHUNK = re.compile(r"c/([0-9a-f]{8})\Z")
_CLAIM = re.compile(r"k/([0-9a-f]{8})\.([0-9a-f]{4})\Z")
MAC = 32
_R = TypeVar("_R", bound=msgspec.Struct)


class Forged(Exception):
    """An object is not what its name says: it has another key or name, is cut short, or was written by somebody
    else."""


class Seal(msgspec.Struct, frozen=True):
    """A file that is whole in the tier. ``digests`` holds those of the chunks, one after the other. ``proof`` is what
    it was proven by ("sha256:…", or "size" where the origin offers nothing), ``by`` the host and ``at`` the wall
    clock."""

    size: int
    chunk_size: int
    digests: bytes
    proof: str
    by: str
    at: float
    path: str = ""


class ClaimRecord(msgspec.Struct, frozen=True):
    """A claim. ``life`` names the process that wrote it; ``beat`` counts its renewals; ``done`` grows with every chunk
    of the group."""

    host: str
    life: str
    beat: int
    done: int


def directory(slot: str, pin: str) -> str:
    return f"v1/{slot}/{pin}/"


def chunk_name(slot: str, pin: str, chunk: int) -> str:
    return f"v1/{slot}/{pin}/c/{chunk:08x}"


def near(chunk: int) -> str:
    """Return what the names of the sixteen chunks around this one begin with, below ``directory``."""
    return f"c/{chunk:08x}"[:-1]


def claim_name(slot: str, pin: str, group: int, epoch: int) -> str:
    return f"v1/{slot}/{pin}/k/{group:08x}.{min(epoch, 0xFFFF):04x}"


def seal_name(slot: str, pin: str) -> str:
    return f"v1/{slot}/{pin}/seal"


def listed(name: str) -> tuple[int, None] | tuple[int, int] | None:
    """Decode the rest of a name below ``directory``: (chunk, None), or (group, epoch) of a claim."""
    if (match := _CHUNK.match(name)) is not None:
        return int(match[1], 16), None
    if (match := _CLAIM.match(name)) is not None:
        return int(match[1], 16), int(match[2], 16)
    return None


def pack(key: RegionKey, kind: str, name: str, record: msgspec.Struct) -> bytes:
    """Return the record's object."""
    body = msgspec.msgpack.encode(record)
    return key.sign(kind, name, body) + body


def _unpack(key: RegionKey, kind: str, name: str, data: bytes) -> bytes:
    mac, body = data[:MAC], data[MAC:]
    if len(mac) != MAC or not hmac.compare_digest(mac, key.sign(kind, name, body)):
        raise Forged(f"{name}: not written with this region's key, or not for this name")
    return body


def unpack_claim(key: RegionKey, name: str, data: bytes) -> ClaimRecord:
    """Raises Forged."""
    return _decode(_unpack(key, "claim", name, data), ClaimRecord, name)


def unpack_seal(key: RegionKey, name: str, data: bytes, size: int, chunk_size: int) -> Seal:
    """Decode the seal of a file of ``size`` bytes. Raises Forged."""
    seal = _decode(_unpack(key, "seal", name, data), Seal, name)
    chunks = -(-size // chunk_size)
    if (seal.size, seal.chunk_size, len(seal.digests)) != (size, chunk_size, chunks * DIGEST_BYTES):
        raise Forged(f"{name}: it is the seal of another file")
    return seal


def unpack_any_seal(key: RegionKey, name: str, data: bytes) -> Seal:
    """Decode a seal of a file of any size. Raises Forged."""
    seal = _decode(_unpack(key, "seal", name, data), Seal, name)
    if seal.chunk_size <= 0 or len(seal.digests) != -(-seal.size // seal.chunk_size) * DIGEST_BYTES:
        raise Forged(f"{name}: its digests are not those of its chunks")
    return seal


def most_seal(size: int, chunk_size: int) -> int:
    """Return the most bytes that the seal of a file of ``size`` bytes can have."""
    return MOST_RECORD + -(-size // chunk_size) * DIGEST_BYTES


def unpack(key: RegionKey, kind: str, name: str, data: bytes, record: type[_R]) -> _R:
    """Decode a record of any kind. Raises Forged."""
    return _decode(_unpack(key, kind, name, data), record, name)


def _decode(body: bytes, kind: type[_R], name: str) -> _R:
    try:
        return msgspec.msgpack.decode(body, type=kind)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise Forged(f"{name}: cannot be read ({error})") from error
