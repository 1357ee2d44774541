"""Which scope each route asks for: one table. A route that is not in it is closed to every key.

Knows nothing about keys beyond their scopes.
"""

from collections.abc import Mapping

from server.api.keys.key import Key, Scope

# What probes of the machine need; nothing in their answers is anybody's. They are open as they are written here.
OPEN_PATHS = frozenset({"/health", "/ping", "/ready", "/v2/health/live", "/v2/health/ready", "/version"})
METRICS_PATH = "/metrics"  # open where the operator says so

_ANY = frozenset(Scope)
_LOOK = frozenset({Scope.INFER, Scope.ADAPTERS, Scope.ADMIN})
_INFER = frozenset({Scope.INFER})
_ADAPTERS = frozenset({Scope.ADAPTERS})
_METRICS = frozenset({Scope.METRICS, Scope.ADMIN})
_ADMIN = frozenset({Scope.ADMIN})

# (method, path) -> a key needs one of these.
SCOPES: Mapping[tuple[str, str], frozenset[Scope]] = {
    ("POST", "/v1/completions"): _INFER,
    ("POST", "/v1/chat/completions"): _INFER,
    ("POST", "/tokenize"): _INFER,
    ("POST", "/detokenize"): _INFER,
    ("GET", "/tokenizer_info"): _INFER,
    ("GET", "/v1/models"): _LOOK,
    ("GET", "/v1/models/{id:path}"): _LOOK,
    ("GET", "/v1/adapters"): _LOOK,
    ("GET", "/v1/adapters/{name}"): _LOOK,
    ("GET", "/v1/adapters/{name}/versions"): _LOOK,
    ("GET", "/v1/adapters/{name}/fetch"): _LOOK,
    ("POST", "/v1/adapters"): _ADAPTERS,
    ("PUT", "/v1/adapters/{name}"): _ADAPTERS,
    ("DELETE", "/v1/adapters/{name}"): _ADAPTERS,
    ("DELETE", "/v1/adapters/{name}/fetch"): _ADAPTERS,
    ("POST", "/v1/adapters/{name}/load"): _ADAPTERS,
    ("POST", "/v1/adapters/{name}/unload"): _ADAPTERS,
    ("POST", "/v1/adapters/{name}/rollback"): _ADAPTERS,
    ("POST", "/v1/adapters/merge"): _ADAPTERS,
    ("POST", "/v1/unload_lora_adapter"): _ADAPTERS,
    # These take what all share, let back in what failed all, or read the machine's own folders.
    ("POST", "/v1/adapters/{name}/pin"): _ADMIN,
    ("POST", "/v1/adapters/{name}/unpin"): _ADMIN,
    ("POST", "/v1/adapters/{name}/lift_quarantine"): _ADMIN,
    ("POST", "/v1/load_lora_adapter"): _ADMIN,
    ("GET", "/load"): _METRICS,
    ("GET", METRICS_PATH): _METRICS,
    ("GET", "/openapi.json"): _ANY,
}


def may_see_metrics(key: Key | None) -> bool:
    """Whether a key, or a stranger, may be told how busy the server is."""
    return key is not None and bool(key.scopes & _METRICS)
