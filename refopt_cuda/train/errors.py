"""What a user can put right: the command line prints it as one sentence and exits with 2."""


class InputError(ValueError):
    """Input that cannot be used, found before any work is done."""
