"""Every error that fastdeploy raises on purpose.

FastDeployError
├── ConfigError            a flag, config file or combination of them cannot work; found at start
├── CheckpointError        a checkpoint file or tensor is missing, truncated or of the wrong shape
├── EngineError            the engine as a whole cannot go on
│   ├── EngineStartError   it did not come up
│   └── EngineDeadError    it was up and is gone
├── TransferError          KV pages of another rank could not be read; the request may be computed here instead
│   ├── TransferUnavailable  the protocol does not work here, or the peer cannot be reached
│   ├── LayoutMismatch     the peer's pages are cut in a way that cannot be mapped to this rank's
│   ├── PeerGone           the peer ended, or was started again
│   ├── PullTimeout        the pages did not come within the deadline
│   ├── StalePages         the pages are of another owner or generation, were pulled before, or are pulled now
│   └── WrongPages         what was read does not have the check values that were offered
└── RequestError           one request fails, the engine carries on; carries the HTTP status and OpenAI's error fields
    ├── InvalidRequest     400: a field is wrong; `param` names it
    ├── ContextTooLong     400: prompt (and tokens asked for) exceed the model length
    ├── ModelNotFound      404: the model named is not served here
    ├── Unauthorized       401
    ├── Overloaded         429
    ├── RequestTimeout     504: it waited longer than it may
    └── EngineUnavailable  503: the engine is starting, draining or dead
"""


class FastDeployError(Exception):
    """Base of all errors below; its text is one line that tells what to do."""


class ConfigError(FastDeployError):
    """A flag, a config file or a combination of them cannot work."""


class CheckpointError(FastDeployError):
    """A checkpoint is unusable; the text names the file and the tensor."""


class EngineError(FastDeployError):
    """The engine as a whole cannot go on."""


class EngineStartError(EngineError):
    """The engine did not come up."""


class EngineDeadError(EngineError):
    """The engine was up and is gone."""


class TransferError(FastDeployError):
    """KV pages of another rank could not be read. Nothing but the pages that were to be filled has changed."""


class TransferUnavailable(TransferError):
    """A transfer protocol does not work here, or the peer cannot be reached; the text tells what to check."""


class LayoutMismatch(TransferError):
    """The peer's pages are cut in a way that cannot be mapped to this rank's; the text names the field."""


class PeerGone(TransferError):
    """The peer ended, or another process has taken its place."""


class PullTimeout(TransferError):
    """The pages did not come within the deadline."""


class StalePages(TransferError):
    """A page set is of another owner or an older generation, or its pages were pulled already or are being pulled."""


class WrongPages(TransferError):
    """What was read does not have the check values offered; the text names layer, page, expected and found value."""


class RequestError(FastDeployError):
    """One request fails and the engine carries on.

    `status` is the HTTP status; `kind`, `code` and `param` are the fields of OpenAI's error body.
    """

    status = 400
    kind = "invalid_request_error"
    code: str | None = "invalid_value"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidRequest(RequestError, ValueError):
    """A request field is wrong; `param` names it. A ValueError, as `LLM` raises for what is wrong with a call."""


class MissingField(InvalidRequest):
    """A request field that must be there is absent; `param` names it."""

    code = "missing_required_parameter"


class ContextTooLong(RequestError, ValueError):
    """The prompt, or the prompt and the tokens asked for, exceed the model length."""

    code = "context_length_exceeded"


class ModelNotFound(RequestError):
    """The model that the request names is not served here."""

    status = 404
    code = "model_not_support"


class Unauthorized(RequestError):
    """The API key is missing or wrong."""

    status = 401
    code = "invalid_api_key"


class Overloaded(RequestError):
    """More requests than the server may hold at once."""

    status = 429
    kind = "rate_limit_error"
    code = "rate_limit_exceeded"


class RequestTimeout(RequestError):
    """The request waited longer than it may."""

    status = 504
    kind = "timeout_error"
    code = "timeout"


class EngineUnavailable(RequestError):
    """The engine is starting, draining or dead: the request may be sent elsewhere."""

    status = 503
    kind = "server_error"
    code = "engine_unavailable"
