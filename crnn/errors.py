"""Mistakes a user can mend. The command line shows them as one sentence and exits with code 2."""

from collections.abc import Callable


class UserError(Exception):
    """The rule that was broken, the value that broke it, and the mend, in one sentence."""


class SettingsError(UserError):
    """An experiment file, an override or an option that cannot be used."""


class DataError(UserError):
    """Samples, label files or charsets that cannot be used."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or made for something else."""


class TrackingError(UserError):
    """MLflow is needed for the answer and cannot be reached."""


class PassingError(UserError):
    """What may be over when it is tried again: a full disk, a place that is away for a while."""


class StoppedError(UserError):
    """The pipeline was told to stop; finished epochs are kept."""


Stopping = Callable[[], bool]
"""Asked now and then by what takes long; once it says so, StoppedError is raised."""


def never() -> bool:
    """Nobody asks to stop."""
    return False


class NonFiniteLossError(UserError):
    """Training met a loss that is infinite or not a number."""
