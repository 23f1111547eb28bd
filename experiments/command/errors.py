"""The errors a user can cause. The text of each is one line: what is wrong and what is allowed."""

import signal


class ExperimentError(Exception):
    """Base of all known errors; the command lines print its text and exit with code 2."""

    def __str__(self) -> str:
        # A key or a path may hold anything, line breaks too.
        text = super().__str__()
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class ConfigError(ExperimentError):
    """A config file, key or value that cannot be used."""


class DataError(ExperimentError):
    """Data that is missing, damaged or smaller than what was asked for."""


class DeviceError(ExperimentError):
    """A device that is not there, has too little memory, or cannot do what is asked of it."""


class RecordError(ExperimentError):
    """A run's folder that cannot be written or read back, or is in use."""


class CheckpointError(RecordError):
    """A checkpoint that is damaged or belongs to another run."""


class ToldElsewhere(BaseException):
    """Another of the processes that train together tells why they end; this one ends in silence, with exit code 0.

    Not with another one: torchrun would end the process that tells, maybe before it has. No `Exception`, as
    `Interrupted` is none.
    """


def reason(error: BaseException, limit: int = 300) -> str:
    """What another's error says, on one line: the system's words, else its text, else its kind."""
    return " ".join((getattr(error, "strerror", None) or str(error)).split())[:limit] or type(error).__name__


def counted(number: int, noun: str) -> str:
    """'1 epoch', '2 epochs'."""
    return f"{number} {noun}{'s' * (number != 1)}"


class Interrupted(BaseException):
    """A signal asked the program to stop; the text says what is kept.

    Like `KeyboardInterrupt` no `Exception`, so that nothing takes it for a failure of its own.
    """

    def __init__(self, number: int, text: str = "the files written so far are kept") -> None:
        super().__init__(text)
        self.signal = signal.Signals(number)

    @property
    def exit_code(self) -> int:
        """130 for SIGINT, 143 for SIGTERM, 129 for SIGHUP, as shells have it."""
        return 128 + self.signal
