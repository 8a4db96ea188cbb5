"""Programs that are run by hand, as `python -m tools.NAME`: nothing imports them, and any of them may be
removed."""
