"""The commands, one module for each task. A command reads its arguments, asks the daemon and prints the answer.

A new command goes into the module of its task: ``service`` (the daemon and its machine), ``pipelines`` (what is cached
and kept), ``prefetch`` (GPU memory), ``cold_starts`` (where the time went), ``listing`` (what there is). What a command
prints is formatted in ``cli/show.py``; what takes long is imported inside the command.
"""
