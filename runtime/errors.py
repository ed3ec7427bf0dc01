"""The errors that a user may see as a sentence instead of a traceback. Knows nothing else."""


class UserError(Exception):
    """The input or the environment is at fault: what was asked, what was found, what to do next.

    The command line prints it as one sentence on stderr and exits with 2.
    """


class EnginesMissing(UserError):
    """A bundle has no TensorRT engines that run here; the sentence says why not."""
