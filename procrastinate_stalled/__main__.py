"""``python -m procrastinate_stalled``: the command line."""

from procrastinate_stalled.cli import main

main()
