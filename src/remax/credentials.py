"""Keys and tokens of servers. They come from the environment: a flag would be seen by others, and recorded."""

import os

from remax.errors import UserError


def read_credential(variable: str) -> str | None:
    """Returns the key or token in an environment variable, None if there is none.

    Raises:
        UserError: no header could hold it. It is not shown.
    """
    value = os.environ.get(variable)
    if value and not (value.isascii() and value.isprintable() and " " not in value):
        raise UserError(
            f"the environment variable {variable} has characters that no key can have, so no server would take it; set "
            "letters, digits and signs without spaces."
        )
    return value or None
