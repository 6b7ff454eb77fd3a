"""What goes wrong in a way that a user can mend. Every message is one line: what, where, what to do."""


class TTTError(Exception):
    """Base of all errors that the command line shows as one line with exit status 2."""


class CheckpointError(TTTError):
    """A checkpoint or model directory that cannot be read, or does not hold what its config says."""


class QuantizationError(TTTError):
    """A way to quantize that MLX does not have, or that fits no matrix of the model."""


class HubError(TTTError):
    """A repository on the Hugging Face Hub that cannot be read or written, or a Hub that cannot be reached."""


class TokenizerError(TTTError):
    """Tokenizer files that are damaged or of a kind that cannot be represented."""


class PromptError(TTTError):
    """A prompt that cannot be read: it is empty, or has tokens that the model does not know."""


class OutputError(TTTError):
    """A place that cannot be written to: it exists, the disk is full, permission is denied."""


class StateError(TTTError):
    """A saved state that is damaged or was made by another model."""
