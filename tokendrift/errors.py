"""The one exception that this package raises for bad input."""


class TokenDriftError(ValueError):
    """Input that cannot be used.

    The message names the argument, what was expected (B batch, L length, V vocabulary, D embedding width, M feature
    width, N anchors, P positives, Q negatives), what was given, and what to do.
    """


class UnknownOptionError(TokenDriftError, TypeError):
    """A keyword argument that does not exist. The message names the nearest one that does."""
