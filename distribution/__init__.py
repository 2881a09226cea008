"""How packages are built: scripts/package and scripts/image say it in order."""
