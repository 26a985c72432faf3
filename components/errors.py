"""Errors that a user can mend: shown as one message, without a traceback."""


class RecipeError(ValueError):
    """A mistake in a recipe or in the files it names. The message says what, where, with which values, and the remedy."""


class BadSample(RecipeError):
    """One sample that cannot be used: a broken picture, a placeholder mismatch, nothing supervised."""
