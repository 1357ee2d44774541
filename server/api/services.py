"""What the routes work with: the engine, the registry, the tokenizer and the facts about the base, as one value.

Built once by the roof and handed to `create_app`. Knows nothing about HTTP, nor in which process its parts are.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

from server.api.faces import EngineFace, EntryFace, FetchesFace, GrammarsFace, MergesFace, RegistryFace, StoreFace
from server.api.keys.keyring import Keyring
from server.api.lanes import Lanes
from server.api.snapshot import Snapshot
from server.ground.metrics import Metrics
from server.model.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class BaseInfo:
    """The base as clients see it.

    `served_names` are the values of a request's `model` that mean the bare base; the first is the one that answers
    carry when the request names none. `max_context` counts prompt and generated tokens together. `vocab_size` counts
    the rows of the embedding, of which there may be fewer than the tokenizer has tokens. `fingerprint` is that of its
    checkpoint (`server.model.fingerprint`), None where that has none.
    """

    name: str
    served_names: tuple[str, ...]
    max_context: int
    vocab_size: int
    fingerprint: str | None = None


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """What the operator says of conversations; see the settings of the same names."""

    tool_call_parser: str = "auto"
    reasoning_parser: str = "auto"
    template_variables: frozenset[str] = frozenset()  # that requests may set
    trusts_adapter_templates: bool = False


@dataclass(frozen=True, slots=True)
class HttpOptions:
    """What the operator says of requests, whatever they are for."""

    keep_alive_s: float = 0.0  # a stream that says nothing for so long says that it lives; 0: never
    ignores_unknown_fields: bool = False  # and names them in a header of the answer, instead of refusing them
    allowed_origins: tuple[str, ...] = ()  # web pages that may ask, "*" for all
    open_metrics: bool = False  # whether /metrics needs no key
    shares_prefixes: bool = False  # whether owners of keys reuse one another's blocks of the KV cache


@dataclass(frozen=True, slots=True)
class Services:
    engine: EngineFace
    entry: EntryFace
    registry: RegistryFace
    store: StoreFace
    merges: MergesFace
    fetches: FetchesFace
    tokenizer: Tokenizer
    grammars: GrammarsFace
    base: BaseInfo
    metrics: Metrics
    snapshot: Callable[[Collection[str]], Snapshot]  # blocks; of the names, it tells which are gone
    version: str  # of this server
    started_at: float  # seconds since the epoch
    keyring: Keyring | None = None  # None: no key is asked for
    max_upload_bytes: int = 4 * 1024**3  # of one upload
    store_quota_bytes: int | None = None  # of all adapters in the store
    max_body_bytes: int = 16 * 1024**2  # of every other request
    adapter_paths: tuple[Path, ...] = ()  # the folders of this machine from which a request may have adapters read
    chat: ChatOptions = ChatOptions()
    max_queued: int = 256  # sequences that may wait: a request of more could never be accepted
    http: HttpOptions = HttpOptions()
    lanes: Lanes = field(default_factory=Lanes)
