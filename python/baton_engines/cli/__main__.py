"""python -m baton_engines.cli: the command `baton` where the console script is not installed."""

from .main import main

main()
