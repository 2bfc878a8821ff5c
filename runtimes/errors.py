"""Every error a user can cause. A message says what, where, expected against got, and the remedy; the CLI prints it as one line."""

from __future__ import annotations


class ReftError(Exception):
    """Base of all errors that end a command with one line instead of a traceback.

    ``exit_code`` follows the CLI's convention: 1 failure, 2 usage or refused input, 3 parity, 4 incompatible device or artifact.
    """

    exit_code = 1


class InputError(ReftError):
    """A file, option or prompt the user gave cannot be used."""

    exit_code = 2


class AdapterError(ReftError):
    """An adapter is damaged, or does not fit the base it is used with."""

    exit_code = 2


class ExportError(ReftError):
    """The host could not turn a model into a graph."""


class GraphError(ReftError):
    """A graph is damaged, or is not a decoder that the fold understands."""

    exit_code = 2


class SiteNotFound(GraphError):
    """No tensor of the graph is the asked-for stream."""


class SiteAmbiguous(GraphError):
    """Several tensors of the graph could be the asked-for stream; the message lists them."""


class CalibrationError(ReftError):
    """Quantization or calibration cannot do what was asked."""

    exit_code = 2


class BundleError(ReftError):
    """A bundle folder is incomplete, changed since it was written, or of another version."""

    exit_code = 2


class BackendUnavailable(ReftError):
    """The runtime, provider or library that was asked for is not on this device."""

    exit_code = 4


class EngineError(ReftError):
    """A bundle cannot become an engine of the target that was asked for."""

    exit_code = 4


class BuildError(ReftError):
    """TensorRT could not build an engine, or built another network than it was given."""


class ParityError(ReftError):
    """A parity budget was missed. ``report`` holds every figure that was taken."""

    exit_code = 3

    def __init__(self, message: str, report: object = None) -> None:
        super().__init__(message)
        self.report = report
