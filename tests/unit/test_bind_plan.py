"""What is detached and what is bound, given what is and what should be."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from instantstart_fs.mount.bind_mounts import Plan, plan
from instantstart_fs.serving.bindings import BindableFile


def file(path: str, generation: int = 1, incarnation: int = 0) -> BindableFile:
    return BindableFile("p", generation, 0, incarnation, path, 0o444, 0, 0, 0)


def test_nothing_to_do() -> None:
    assert plan({}, {}) == Plan((), ())
    assert plan({"a": file("a")}, {"a": file("a")}) == Plan((), ())


def test_another_incarnation_or_owner_is_detached_and_bound_anew() -> None:
    old, new = file("a"), file("a", incarnation=1)
    assert plan({"a": old}, {"a": new}) == Plan(("a",), (new,))
    owned = msgspec.structs.replace(old, uid=7)
    assert plan({"a": old}, {"a": owned}) == Plan(("a",), (owned,))


files = st.dictionaries(
    st.sampled_from("abc"), st.builds(lambda g, i: (g, i), st.integers(1, 2), st.integers(0, 1)), max_size=3
).map(lambda found: {path: file(path, *which) for path, which in found.items()})


@given(files, files)
def test_carrying_it_out_leads_to_what_is_wanted(
    bound: dict[str, BindableFile], wanted: dict[str, BindableFile]
) -> None:
    todo = plan(bound, wanted)
    left = {path: one for path, one in bound.items() if path not in todo.detach}
    for one in todo.attach:
        assert one.path not in left, "bound over a bind"
        left[one.path] = one
    assert left == wanted
