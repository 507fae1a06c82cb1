"""The errors a user can meet, each with one message that says what to do."""


def shown(value: object) -> str:
    """A user's value in an error message: short, whatever it is."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**15:
        return "a whole number of more than 15 digits"  # printing it could fail
    return repr(value)[:40]


class StepError(ValueError):
    """Base of every error this package raises on purpose."""


class ConfigError(StepError):
    """A flag or an engine argument is wrong, or asks for what is not supported with STEP."""


class ScorerError(StepError):
    """A scorer file is missing, unreadable, or does not fit the model."""


class BoundaryError(StepError):
    """No token of the tokenizer contains the step delimiter."""


class RequestError(StepError):
    """A request's ``custom_params.step`` is malformed; served as HTTP 400."""


class VoteError(StepError):
    """There is no such vote, early-finish rule or answer extractor."""
