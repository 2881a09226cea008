"""The control socket, by which the command line and other administrators talk to the daemon: JSON lines.

``protocol`` is pure. In the daemon, on trio: ``server`` accepts, ``connection`` reads and answers, ``callers`` decides
who may ask, ``dispatcher`` does what was asked. ``client`` blocks and is quick to import. docs/CONFIGURATION.md
documents the messages.
"""
