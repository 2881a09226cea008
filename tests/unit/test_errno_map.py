"""The errno table: a row for every class, and what the rows that matter say."""

from __future__ import annotations

import errno

from instantstart_fs import errors
from instantstart_fs.mount.errno_map import ERRNO, errno_of


def test_every_class_has_a_row_of_its_own() -> None:
    # Other tests may have defined subclasses of their own; the tree is what errors.py holds.
    tree = {cls for cls in errors.all_errors() if cls.__module__ == errors.__name__}
    assert len(tree) > 25
    assert set(ERRNO) == tree


def test_every_row_is_a_real_errno() -> None:
    assert all(number in errno.errorcode for number in ERRNO.values())


def test_an_origins_404_is_not_an_absent_file() -> None:
    assert errno_of(errors.OriginNotFound("gone")) == errno.EIO


def test_a_missing_entry_is_what_the_caller_says_it_is() -> None:
    missing = errors.NoSuchEntry("x")
    assert errno_of(missing) == errno.ENOENT
    assert errno_of(missing, missing=errno.ESTALE) == errno.ESTALE


def test_gone_changes_nothing_for_other_errors() -> None:
    assert errno_of(errors.StoreFull("x"), missing=errno.ESTALE) == errno.ENOSPC


def test_a_class_from_elsewhere_takes_its_ancestors_row() -> None:
    class Refused(errors.AccessRefused):
        code = "test-only"

    assert errno_of(Refused("x")) == errno.EACCES
