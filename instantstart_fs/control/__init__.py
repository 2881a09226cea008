"""How the command line, and whoever else administers a daemon, talks to it: JSON lines over a unix socket.

``protocol`` is pure; ``server`` runs in the daemon (trio); ``client`` blocks and is quick to import.
docs/CONFIGURATION.md documents the messages.
"""
