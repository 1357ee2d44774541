"""Every error that a user can meet, each with the HTTP status and the machine code it is shown with.

Owns the tree below and the wording rules (name the field, the limit, the remedy). Knows nothing about HTTP frameworks.

    GraftError
    ├── BadRequest           400  a field is wrong, unsupported or out of range
    │   ├── ContextTooLong   400  prompt + max_tokens exceed the context window
    │   └── AdapterRejected  400  a checkpoint that this server cannot apply exactly
    ├── Unauthorized         401  the key is missing or wrong
    ├── Forbidden            403  a web page of another origin asks, and no key says that it may
    ├── NotFound             404
    │   └── AdapterNotFound  404
    ├── Conflict             409  the name exists with other content, or is in use
    │   └── PreconditionFailed 412  the name exists, and the request is for a new one only
    ├── TooLarge             413  a body or a file over its limit
    │   └── HeadTooLarge     431  a request's path or headers over their limit
    ├── UnsupportedMediaType 415  a body that is not declared as what the route reads
    ├── StorageFull          507  the store's quota or its disk has no room for an upload
    ├── AdapterFailed        424  the output with the adapter overflowed: no number could be told
    │   ├── AdapterQuarantined 424 it has done so too often, and is served to nobody
    │   └── AdapterDamaged   424  its files in the store are not those that were stored
    ├── GenerationFailed     500  the engine failed while the request ran
    │   ├── OutOfMemory      500  the request needs more memory than there is, even alone
    │   └── RequestTimedOut  504  the request took longer than --request-timeout
    ├── RateLimited          429  a key has used what its limits allow; carries Retry-After
    ├── Overloaded           503  the queue is full or too slow; carries Retry-After
    │   └── StoreUnreachable 503  the store that adapters are kept in does not answer, or denies access
    │   └── AdapterOnItsWay  503  the adapter is being fetched for the first time
    ├── SourceFailed         502  the place that an adapter is fetched from failed
    └── StartupRefused        -   the server cannot start with these settings
"""


class GraftError(Exception):
    """Base of all errors shown to users.

    `message` is a sentence that says what to do, `param` names the offending request field (or None), `code` is a
    stable machine word, `status` the HTTP status, `type` OpenAI's error type. `reason` is what metrics count it under.
    """

    status: int = 500
    type: str = "server_error"
    code: str = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code

    @property
    def reason(self) -> str:
        return self.code


class BadRequest(GraftError):
    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class ContextTooLong(BadRequest):
    code = "context_length_exceeded"


class AdapterRejected(BadRequest):
    code = "invalid_adapter"


class Unauthorized(GraftError):
    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class Forbidden(GraftError):
    status = 403
    type = "permission_error"
    code = "foreign_origin"


class NotFound(GraftError):
    status = 404
    type = "not_found_error"
    code = "not_found"


class AdapterNotFound(NotFound):
    code = "adapter_not_found"


class Conflict(GraftError):
    status = 409
    type = "conflict_error"
    code = "conflict"


class PreconditionFailed(Conflict):
    status = 412
    code = "precondition_failed"


class TooLarge(GraftError):
    status = 413
    type = "invalid_request_error"
    code = "too_large"


class HeadTooLarge(TooLarge):
    status = 431
    code = "head_too_large"


class UnsupportedMediaType(GraftError):
    status = 415
    type = "invalid_request_error"
    code = "unsupported_media_type"


class RateLimited(GraftError):
    """A key's own limit; `retry_after_s` is the wait that the answer's Retry-After header asks for."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class StorageFull(GraftError):
    status = 507
    type = "storage_error"
    code = "storage_full"


class GenerationFailed(GraftError):
    status = 500
    code = "generation_failed"


class AdapterFailed(GraftError):
    """The weights of an adapter are too large for the base's arithmetic; sent again, the request would fail again."""

    status = 424
    type = "adapter_error"
    code = "adapter_overflow"


class AdapterQuarantined(AdapterFailed):
    code = "adapter_quarantined"


class AdapterDamaged(AdapterFailed):
    code = "adapter_damaged"


class OutOfMemory(GenerationFailed):
    code = "out_of_memory"


class RequestTimedOut(GenerationFailed):
    """A request took longer than this server lets any take; sent again, it would take as long."""

    status = 504
    code = "request_timeout"


class Overloaded(GraftError):
    """The server is full; `retry_after_s` is the wait that the answer's Retry-After header asks for.

    To a client one thing that is full is as another, and the code is one; `reason` tells them apart in the metrics.
    """

    status = 503
    type = "overloaded_error"
    code = "overloaded"

    def __init__(self, message: str, *, retry_after_s: int = 1, reason: str | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self._reason = reason

    @property
    def reason(self) -> str:
        return self._reason or self.code


class AdapterOnItsWay(Overloaded):
    code = "adapter_on_its_way"


class SourceFailed(GraftError):
    status = 502
    type = "upstream_error"
    code = "source_failed"


class StoreUnreachable(Overloaded):
    type = "storage_error"
    code = "store_unreachable"

    def __init__(self, message: str, *, retry_after_s: int = 5) -> None:
        super().__init__(message, retry_after_s=retry_after_s)


class StartupRefused(GraftError):
    code = "startup_refused"
