"""Errors as the engine and the front tell them to each other."""

from lorry.rpc.errors import ERRORS, AdapterIncompatible, LorryError
from lorry.worker.messages import Failure

# A reason names one class here: an adapter that a worker refuses was uploaded long ago.
CLASSES: list[type[LorryError]] = [*ERRORS.values(), AdapterIncompatible]
BY_REASON = {cls.reason: cls for cls in CLASSES}


def to_failure(error: LorryError) -> Failure:
    return Failure(error.reason, str(error), error.metadata)


def to_error(failure: Failure) -> LorryError:
    error = BY_REASON.get(failure.reason, LorryError)(failure.message)
    error.metadata = failure.metadata
    return error
