"""``python -m mep.cli``: the command line where the script ``mep`` is not installed."""

from mep.cli import main

main()
