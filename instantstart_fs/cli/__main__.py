"""``python -m instantstart_fs.cli``."""

from instantstart_fs.cli import main

main()
