"""The scripts by which shells ask for completions, and their installation: `--show-completion`, `--install-completion`.

bash's and fish's are typer's own. zsh's is ours: where zsh loads typer's from a directory, as it is installed, the
first TAB offers nothing (it only defines a function then), and apostrophes are lost in any case.
"""

from __future__ import annotations

import os

from instantstart_fs.core.humanize import did_you_mean
from instantstart_fs.errors import InstantStartError, UsageError, printable

SHOW, INSTALL = "--show-completion", "--install-completion"
SHELLS = ("bash", "zsh", "fish")
ZSH = """\
#compdef instantstart

_instantstart() {
  local line value
  local -a offered
  for line in "${(@f)$(env _TYPER_COMPLETE_ARGS="${words[1,$CURRENT]}" _TYPER_COMPLETE_FISH_ACTION=get-args \\
      _INSTANTSTART_COMPLETE=complete_fish instantstart 2>/dev/null)}"; do
    value="${${line%%$'\\t'*}//:/\\\\:}"
    [[ "$line" == *$'\\t'* ]] && value+=":${line#*$'\\t'}"
    [[ -n "$value" ]] && offered+=("$value")
  done
  if (( $#offered )); then
    _describe instantstart offered
  else
    _files
  fi
}

if [[ "$funcstack[1]" == _instantstart ]]; then
  _instantstart "$@"
else
  compdef _instantstart instantstart
fi
"""
"""It reads what fish reads: a word, a tab, its help. The last lines: where zsh loads this file as a function, the first
TAB is what calls it."""


def asked(words: list[str]) -> tuple[str, str | None] | None:
    """Return which of the two options a line begins with, and for which shell (None: the one it is typed in); None for
    every other line. Raises UsageError for what is no shell."""
    option, equals, shell = words[0].partition("=") if words else ("", "", "")
    if option not in (SHOW, INSTALL):
        return None
    if not equals:
        shell = words[1] if len(words) > 1 else ""
    if shell and shell not in SHELLS:
        raise UsageError(f"{option}: {printable(shell)!r} is none of {', '.join(SHELLS)}{did_you_mean(shell, SHELLS)}")
    return option, shell or None


def answer(option: str, shell: str | None) -> str:
    """Return what the option prints; ``--install-completion`` writes the user's files. Raises InstantStartError."""
    shell = shell or _current()
    if option == SHOW:
        return script(shell)
    from typer._completion_shared import install

    try:
        _, path = install(shell=shell, prog_name="instantstart", complete_var="_INSTANTSTART_COMPLETE")
        if shell == "zsh":
            path.write_text(script(shell), encoding="utf-8")
    except OSError as error:
        raise InstantStartError(f"{error.filename}: {error.strerror or error}") from error
    return f"{shell} completes instantstart from its next start on ({path})"


def script(shell: str) -> str:
    from typer._completion_shared import get_completion_script

    if shell == "zsh":
        return ZSH
    return get_completion_script(prog_name="instantstart", complete_var="_INSTANTSTART_COMPLETE", shell=shell) + "\n"


def _current() -> str:
    """Return the shell that this command was typed in: the nearest process above that is one, else $SHELL. Raises
    UsageError."""
    pid = os.getppid()
    while pid > 1:
        try:
            with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
                name, _, rest = file.read().partition("(")[2].rpartition(")")
        except OSError:
            break
        if name.lstrip("-") in SHELLS:
            return name.lstrip("-")
        pid = int(rest.split()[1])
    name = os.path.basename(os.environ.get("SHELL", ""))
    if name not in SHELLS:
        raise UsageError(f"which shell? {SHOW} {'|'.join(SHELLS)}")
    return name
