"""Errors that the user can mend, and parsers that say them in a line."""

from typing import NoReturn


class UserError(ValueError):
    """Shown without a traceback."""


class ShortErrors:
    """Mixed into a parser of options: an error is a line, not a page of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises: UserError, always."""
        raise UserError(message)
