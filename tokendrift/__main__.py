"""The command ``tokendrift``, as ``python -m tokendrift``."""

from tokendrift.cli import main

main()
