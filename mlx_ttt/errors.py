"""Errors that a user can mend. Every message is one line: what, where, what to do."""


class TTTError(Exception):
    """Base of all errors that the command line shows as one line, with exit status 2."""


class CheckpointError(TTTError):
    """A checkpoint or model directory that cannot be read, or that does not match its config."""


class QuantizationError(TTTError):
    """A kind of quantization that MLX does not have, or that fits no matrix of the model."""


class HubError(TTTError):
    """A repository on the Hugging Face Hub that cannot be read or written, or a Hub that cannot be reached."""


class TokenizerError(TTTError):
    """Tokenizer files that are damaged, or of a kind that cannot be converted."""


class PromptError(TTTError):
    """A prompt that is empty, or that has tokens which the model does not know."""


class TrainingError(TTTError):
    """A training that cannot start or go on: options that contradict each other, a loss that is no number."""


class OutputError(TTTError):
    """A place that cannot be written to: something is there already, the disk is full, permission is denied."""


class StateError(TTTError):
    """A state that is damaged, that was made with another model, or that cannot be changed as asked."""


class TrainingDataError(TTTError):
    """Training data that is missing, empty, or not what it should be."""


class DistributedError(TTTError):
    """Machines that do not find each other, one that is lost, or a model that cannot be split over so many."""
