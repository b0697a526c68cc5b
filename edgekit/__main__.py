"""`python -m edgekit`, for launchers that start modules."""

from edgekit.cli import main

main()
