"""The one exception that stands for a mistake of the user's."""


class UserError(ValueError):
    """Says in one line what was given, what is wrong with it and what is allowed; commands print it and exit with 1."""
