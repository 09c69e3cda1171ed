"""The one exception for mistakes of the user: bad configuration, bad input, a broken checkpoint folder."""


class UsageError(ValueError):
    """Something the user gave is wrong; the message is one line that names the field, what was expected and what came.

    Command lines print it as `error: ...` and exit with code 2; everything else keeps its traceback.
    """
