"""Starts the product's own modules as child processes. Callers make the sockets and speak the protocols."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Collection, Mapping
from typing import Any

_PACKAGE_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def spawn_module(
    module: str,
    *arguments: str,
    pass_fds: Collection[int] = (),
    defaults: Mapping[str, str] | None = None,
    without: Collection[str] = (),
    settings: Mapping[str, str] | None = None,
    **options: Any,
) -> subprocess.Popen[bytes]:
    """``python -m module``, from this very copy of the package, with this interpreter.

    Args:
        defaults: environment variables to set where they are not set.
        without: environment variables that the child must not inherit.
        settings: environment variables to set, whatever they are here.
        options: as of ``subprocess.Popen``; stdin is /dev/null unless told otherwise.

    Raises:
        OSError: no process can be started.
    """
    environment = {**(defaults or {}), **os.environ}
    for name in without:
        environment.pop(name, None)
    environment |= settings or {}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (_PACKAGE_ROOT, environment.get("PYTHONPATH"))))
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        pass_fds=pass_fds,
        env=environment,
        **{"stdin": subprocess.DEVNULL, **options},
    )
