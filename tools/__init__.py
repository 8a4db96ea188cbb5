"""Programs that are run by hand, as `python -m tools.NAME`: nothing imports them."""
