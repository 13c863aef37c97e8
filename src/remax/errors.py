"""The one exception that means "you can fix this": the command line prints it as one sentence and exits with 2."""


class UserError(ValueError):
    """A setting or an input is wrong.

    The message is one sentence that names what was set (the real flag and value), what follows from it and what to
    set instead. Raised before anything expensive starts wherever that is possible.
    """
