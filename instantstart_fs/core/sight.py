"""What a caller sees of the pipelines, by whatever door it comes: the control socket, the page, the metrics. Pure.

One rule, and it is the mount's: who may list a pipeline's directory, by its owner, group and mode, sees its state. Of
what is not known about a caller the least is assumed, so that nobody sees more by hiding who he is.
"""

from __future__ import annotations

import msgspec

from instantstart_fs.core.manifest import PipelineSpec
from instantstart_fs.core.weights import may_read


class Sight(msgspec.Struct, frozen=True):
    """``everything``: of those who administer. ``uid``, ``groups``: None where the kernel does not say.
    ``owns_by_group``: members of a pipeline's own group count as its owner."""

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
        uids = [self.uid] if self.uid is not None else [spec.uid, ELSE]
        groups = [self.groups] if self.groups is not None else [frozenset({spec.gid}), frozenset[int]()]
        return all(
            may_read(uid, mine, owner=spec.uid, group=spec.gid, mode=spec.mode) for uid in uids for mine in groups
        )


ELSE = -2
"""A uid that nobody has."""
ANYBODY = Sight()
"""Nobody knows who: it sees what every user of the machine may see."""
EVERYTHING = Sight(everything=True)
