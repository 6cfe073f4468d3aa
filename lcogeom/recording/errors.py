"""What the recorder raises."""


class TapError(RuntimeError):
    """The recorder saw nothing, or not what it needs; the message says why and what to do."""
