"""Decisions and values. Pure: no trio, no IO, no clock (time comes in as a parameter)."""
