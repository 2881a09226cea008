"""Command groups for typer: the program's own, and one whose first word is a verb or a pipeline (`prefetch status`
beside `prefetch PIPELINE`).
"""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup

from instantstart_fs.errors import without_secrets


class Verbs(TyperGroup):
    """All of them. What a complaint about the words of a line repeats of it goes into logs of scripts, too."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as error:
            if hasattr(error, "format_message") and hasattr(error, "message"):  # click's, which typer has a copy of
                error.message = without_secrets(error.message)
            raise


class VerbOrPipeline(TyperGroup):
    """Its one hidden command, an ``Unnamed``, takes every line that begins with no verb: those that begin with options
    or with `--` too, so `prefetch -- status` speaks of a pipeline that is named like a verb."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        verbs = [name for name, command in self.commands.items() if not command.hidden]
        if not args or args[0] not in verbs:
            args = [*(name for name in self.commands if name not in verbs), *args]
        return super().parse_args(ctx, ["--", *args])  # the group itself has no options


class Unnamed(TyperCommand):
    """Stands in its group's place: its usage names the group, and `-h` after the group shows it."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        return super().make_context(parent.info_name, args, parent=parent.parent, **extra)
