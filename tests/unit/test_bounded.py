"""Bookkeeping that lives for years does not grow with every name that ever was."""

from __future__ import annotations

from instantstart_fs.filler.quarantine import MOST, Quarantine
from instantstart_fs.filler.rates import WINDOW, Rates
from instantstart_fs.filler.target import FileKey


def test_rates_of_pipelines_that_are_gone_are_forgotten() -> None:
    rates = Rates()
    for number in range(1000):
        rates.add(f"p{number}", 1, float(number) * 2 * WINDOW)
    assert len(rates) <= 2
    assert rates.rate("p999", 999.0 * 2 * WINDOW) == 1.0


def test_the_quarantine_remembers_the_latest() -> None:
    quarantine = Quarantine()
    for number in range(3 * MOST):
        for _ in range(3):
            quarantine.mismatch(FileKey("p", 1, number), 0.0)
    assert len(quarantine) <= MOST
    assert quarantine.refusal(FileKey("p", 1, 3 * MOST - 1), "f", 1.0) is not None
