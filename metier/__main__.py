"""`python -m metier`, for `torchrun -m metier run recipe.yaml`: the same command line."""

from __future__ import annotations

from metier.cli import main

main()
