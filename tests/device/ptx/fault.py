"""The one exception of the device."""


class Fault(RuntimeError):
    """A kernel, or its launch, did what a GPU does not define; the message names kernel, thread, block and place."""
