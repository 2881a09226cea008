"""The daemon as a service of systemd: what is put where, how it is put there and taken away. Nothing of it runs later.

``plan`` decides over texts, ``host`` changes the machine (or a directory that stands for one), ``service`` is what
`instantstart service` and packages call.
"""
