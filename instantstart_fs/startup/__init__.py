"""`instantstart run`: the tenant's side of a replica's start. It takes the lease, restores what an engine compiled at
an earlier start, runs the engine's command, watches it become ready, and keeps what it has compiled.

Until the command runs, nothing is imported here that takes time: no typer, no msgspec, no subprocess, no logging. What
is in ``cli/`` and ``control/`` comes in afterwards.
"""
