"""Decides which pipelines a caller may see, alike at the control socket, the page and the metrics. Pure: those find out
who the caller is.

There is one rule, the mount's: a caller that may list a pipeline's directory, by its owner, group and mode, sees its
state. For what is unknown about a caller the least is assumed, so that hiding an identity shows nothing more.
"""

from __future__ import annotations

import msgspec

from instantstart_fs.core.manifest import PipelineSpec


class Sight(msgspec.Struct, frozen=True):
    """Describes what a caller may see. ``everything``: True for administrators. ``uid``, ``groups``: None if the kernel
    does not say. ``owns_by_group``: members of a pipeline's own group count as its owner."""

    everything: bool = False
    uid: int | None = None
    groups: frozenset[int] | None = None
    owns_by_group: bool = False

    def owns(self, spec: PipelineSpec) -> bool:
        return self.uid == spec.uid or (self.owns_by_group and spec.gid in (self.groups or ()))

    def sees(self, spec: PipelineSpec) -> bool:
        """Whether that pipeline is more to this caller than a name in the mount."""
        if self.everything or self.owns(spec):
            return True
        # As core.weights.may_read decides, of each class that it may belong to; asked 10,000 times for each look.
        member = None if self.groups is None else spec.gid in self.groups
        needed = (0o500 if self.uid is None else 0) | (0 if member is False else 0o050) | (0 if member else 0o005)
        return self.uid == 0 or spec.mode & needed == needed


ANYBODY = Sight()
"""An unknown caller: it sees what every user of the machine may see."""
EVERYTHING = Sight(everything=True)
