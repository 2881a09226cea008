"""The paths of a store. Pure: strings in, strings out.

    <root>/lock                                       one daemon per store (flock; holds its pid)
    <root>/workers.lock                               shared by living fetch workers
    <root>/id                                         the store's identity: its index names it
    <root>/nodeids                                    high-water mark of the nodeids (the index writes it)
    <root>/index/                                     LMDB
    <root>/slots/<pipeline>/pipeline.json
    <root>/slots/<pipeline>/learned.json              what engines were seen to load; need not be there
    <root>/slots/<pipeline>/startup/<number>/         startup caches (store/startupcaches.py); need not be there
    <root>/slots/<pipeline>/<generation>/manifest.json
    <root>/slots/<pipeline>/<generation>/files/<path> content as the index and the seal say
    <root>/bind/                                      empty; where slots/ is bound while files are bound over the mount
    <root>/trash/                                     what is being deleted or not yet written; emptied at open

Directories are 0700 and files 0600: the mount shows them with their pipeline's owner and mode, the store to nobody.
"""

from __future__ import annotations

import os

import msgspec

DIRECTORY_MODE = 0o700
FILE_MODE = 0o600
FORMAT = 1
"""The format of pipeline.json, manifest.json and the seal record. A newer one is refused."""

LOCK = "lock"
WORKERS_LOCK = "workers.lock"
NODEIDS = "nodeids"
IDENTITY = "id"
INDEX = "index"
SLOTS = "slots"
TRASH = "trash"
BIND = "bind"
PIPELINE_FILE = "pipeline.json"
LEARNED_FILE = "learned.json"
MANIFEST_FILE = "manifest.json"
FILES = "files"
STARTUP = "startup"

SEAL_XATTR = "user.instantstart.seal"


class Layout(msgspec.Struct, frozen=True):
    """Absolute paths below ``root``."""

    root: str

    @property
    def lock(self) -> str:
        return os.path.join(self.root, LOCK)

    @property
    def workers_lock(self) -> str:
        return os.path.join(self.root, WORKERS_LOCK)

    @property
    def nodeids(self) -> str:
        return os.path.join(self.root, NODEIDS)

    @property
    def index(self) -> str:
        return os.path.join(self.root, INDEX)

    @property
    def slots(self) -> str:
        return os.path.join(self.root, SLOTS)

    @property
    def trash(self) -> str:
        return os.path.join(self.root, TRASH)

    def pipeline(self, pipeline: str) -> str:
        return os.path.join(self.slots, pipeline)

    def generation(self, pipeline: str, generation: int) -> str:
        return os.path.join(self.slots, pipeline, str(generation))

    def files(self, pipeline: str, generation: int) -> str:
        return os.path.join(self.slots, pipeline, str(generation), FILES)

    def blob(self, pipeline: str, generation: int, path: str) -> str:
        return os.path.join(self.files(pipeline, generation), path)


def generation_number(name: str) -> int | None:
    """The generation that a directory of this name holds; None if it is not one's name."""
    if name.isascii() and name.isdigit() and (name == "0" or not name.startswith("0")):
        return int(name)
    return None
