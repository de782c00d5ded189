"""Every error that a user of leankv-mlx can meet.

Messages are one line and say what to do. The commands print them without a traceback.
"""

from leankv_mlx.terminal import line


class LeanKVError(Exception):
    """Base of all errors raised on purpose by this package."""

    exit_code = 1


class UsageError(LeanKVError):
    """The caller asked for something that has no meaning; exit code 2 on the command line."""

    exit_code = 2


class ConfigError(UsageError, ValueError):
    """A compression setting is unknown or out of range."""


class ShapeError(LeanKVError, ValueError):
    """An array has a shape or dtype that the operation does not take."""


class UnsupportedError(LeanKVError, NotImplementedError):
    """The request is meaningful, but this cache cannot serve it."""


class DroppedTokensError(UnsupportedError):
    """A model asks for all tokens of a cache that has dropped some, or whose heads keep other
    channels."""

    def __init__(self, asks: str = "attends with an array mask") -> None:
        super().__init__(
            f"this model {asks}, which does not go with a policy that drops tokens or a mask of "
            "channels; use policy=keep_all, and no mask=."
        )


class BackendUnavailableError(LeanKVError, RuntimeError):
    """A backend was named that cannot run here."""


class PeerError(LeanKVError):
    """The program that a benchmark compares with is not installed, failed, or hangs."""


class ModelError(LeanKVError):
    """A model cannot be found, loaded or attached to."""


class CacheFileError(LeanKVError):
    """A prompt cache file cannot be read, written or used with this model."""


class CalibrationError(LeanKVError):
    """Thresholds or a mask of a model are missing, cannot be read, or belong to another model."""


class DocumentError(LeanKVError):
    """A document cannot be read, or its text cannot be got at."""


class ContextLengthError(UsageError, ValueError):
    """A prompt does not fit the model's context."""


class RequestError(UsageError):
    """A client of the server asks for something that has no meaning."""


class MemoryLimitError(RequestError):
    """A request takes more KV cache than the server may hold."""


class ServingError(LeanKVError):
    """A request of the server failed after it had begun."""


class ClientLeftError(LeanKVError):
    """Nobody waits for the answer any more."""


def error_line(error: LeanKVError) -> str:
    """What a command prints to stderr about an error."""
    return f"leankv: error: {line(str(error))}"
