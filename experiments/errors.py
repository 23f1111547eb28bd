"""The errors a user can cause. The text of each is one line: what is wrong and what is allowed."""


class ExperimentError(Exception):
    """Base of all known errors; the command lines print its text and exit with code 2."""


class ConfigError(ExperimentError):
    """A config file, key or value that cannot be used."""


class DataError(ExperimentError):
    """Data that is missing, damaged or smaller than what was asked for."""


class DeviceError(ExperimentError):
    """A device that is not there or has too little memory."""


class RecordError(ExperimentError):
    """A run's folder that cannot be written or read back."""
