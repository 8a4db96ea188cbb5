"""One kind of error for what the user can mend: it is printed as one line, and the exit status is 2."""


class UserError(Exception):
    """A mistake in the input.  The message says what is wrong, where, and what to do."""


def first_line(error):
    """What an exception says, in one line that fits into a message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
