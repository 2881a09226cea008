"""Puts the files of the service where a package has them; an administrator calls `instantstart service install`.

python -m distribution.units PREFIX ROOT
"""

from __future__ import annotations

import sys

from instantstart_fs.installation.host import Host
from instantstart_fs.installation.plan import CONFIG_DIRECTORIES, Places, placements
from instantstart_fs.installation.service import templates


def main(prefix: str, root: str) -> None:
    places = Places(
        prefix=prefix, units="/lib/systemd/system", sysusers="/usr/lib/sysusers.d", tmpfiles="/usr/lib/tmpfiles.d"
    )
    host = Host(print, root=root)
    for placement in placements(places, templates()):
        host.put(placement.path, placement.text, placement.mode)
    for directory in CONFIG_DIRECTORIES:
        host.directory(directory)


if __name__ == "__main__":
    main(*sys.argv[1:])
