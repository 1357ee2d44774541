"""Whether an adapter belongs to the base that is served: names and fingerprints compared, doubts put into words.

Owns when two names mean one base, and the sentences. Knows nothing about files, tensors or who asks.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from server.ground.errors import AdapterRejected, BadRequest
from server.model.fingerprint import can_compare

FINGERPRINT = re.compile(r"(?:packed-)?[0-9a-f]{64}")
_MAX_SHOWN_CHARS = 120  # of a name that a stranger's file gives
# How a checkpoint's name says in what form its numbers are; the base is the same.
_FORM = re.compile(r"(?:-(?:unsloth|bnb|[48]bit|nf4|int[48]|fp8|fp16|bf16|fp32|hf|awq|gptq|quantized|dynamic))+$")


@dataclass(frozen=True, slots=True)
class BaseClaim:
    """What is known of the base that an adapter belongs to; None where nothing is."""

    name: str | None = None  # base_model_name_or_path of its config
    fingerprint: str | None = None  # that its maker gave
    checked_name: str | None = None  # of the base that it was validated against when it was stored
    checked_fingerprint: str | None = None


@dataclass(frozen=True, slots=True)
class ServedBase:
    """The base as adapters are compared with it.

    `names` are all names that it goes by, the first for messages; none means that nothing is compared. `fingerprint` is
    None where the checkpoint has none. `is_strict` refuses an adapter of another base instead of warning of it.
    """

    names: tuple[str, ...] = ()
    fingerprint: str | None = None
    is_strict: bool = False

    def doubts(self, claim: BaseClaim) -> tuple[str, ...]:
        """Sentences for the owner of an adapter that seems to be of another base; empty where nothing speaks for that.

        A fingerprint that the adapter's maker gave decides alone, if it can be compared. Else the name is compared,
        and what the adapter was validated against before. An adapter that says nothing raises no doubt.
        """
        if not self.names:
            return ()
        if can_compare(claim.fingerprint, self.fingerprint):
            return () if claim.fingerprint == self.fingerprint else (self._other_fingerprint(claim),)
        found = []
        if claim.name is not None and not self._is_named(claim.name):
            found.append(self._other_name(claim.name))
        if self._was_checked_elsewhere(claim):
            found.append(self._other_check(claim))
        return tuple(found)

    def refusal(self, doubts: Sequence[str]) -> AdapterRejected:
        """What a strict server answers."""
        return AdapterRejected(
            f"{' '.join(doubts)} The server was started with --strict-base, which refuses such adapters.",
            param="adapter",
            code="base_mismatch",
        )

    def _is_named(self, name: str) -> bool:
        return any(is_same_name(name, own) for own in self.names)

    def _was_checked_elsewhere(self, claim: BaseClaim) -> bool:
        if can_compare(claim.checked_fingerprint, self.fingerprint):
            return claim.checked_fingerprint != self.fingerprint
        return claim.checked_name is not None and not self._is_named(claim.checked_name)

    def _other_fingerprint(self, claim: BaseClaim) -> str:
        of = f", {_shown(claim.name)}" if claim.name is not None else ""
        return (
            f"The adapter was made for the base with the fingerprint {_shown(claim.fingerprint)}{of}; this server's "
            f"base {self._shown_self()}. Serve it on its own base."
        )

    def _other_name(self, name: str) -> str:
        or_upload = ", or upload the adapter with this fingerprint as base_fingerprint" if self.fingerprint else ""
        return (
            f"The adapter says that it was trained on {_shown(name)}; this server's base {self._shown_self()}. If the "
            f"two are one base, add that name with --served-model-name{or_upload}."
        )

    def _other_check(self, claim: BaseClaim) -> str:
        name = _shown(claim.checked_name) if claim.checked_name is not None else "a base"
        fingerprint = claim.checked_fingerprint or "unknown"
        return (
            f"The adapter was stored for {name} (fingerprint {_shown(fingerprint)}); this server's base "
            f"{self._shown_self()}. If it is meant for this base, upload it again."
        )

    def _shown_self(self) -> str:
        return f"is {self.names[0]} (fingerprint {self.fingerprint or 'unknown'})"


def is_same_name(one: str, other: str) -> bool:
    """Whether two names of bases, hub ids or folders of any machine, are likely to mean one base.

    Compared is the last part of the path, without case, with "." and "_" as "-", without the words for the form of the
    numbers at its end ("-bnb-4bit", "-fp16", "-hf", ...) and without Meta's former "Meta-" before "Llama". A folder
    of the hub's cache ("models--org--name/snapshots/...") counts as its hub id. Sizes, versions and "-Instruct" count.
    """
    return _bare(one) == _bare(other)


def _bare(name: str) -> str:
    parts = [part for part in re.split(r"[/\\]+", name.strip()) if part]
    cached = next((part for part in parts if part.startswith("models--")), None)
    last = cached.rpartition("--")[2] if cached is not None else (parts or [""])[-1]
    plain = re.sub(r"[._\s-]+", "-", last.lower())
    bare = _FORM.sub("", plain).removeprefix("meta-")
    return bare or plain


def _shown(text: str | None) -> str:
    shown = "".join(letter if letter.isprintable() else "?" for letter in text or "")
    return shown if len(shown) <= _MAX_SHOWN_CHARS else f"{shown[:_MAX_SHOWN_CHARS]}..."


def agreed_fingerprint(sent: str | None, stated: str | None) -> str | None:
    """The fingerprint that comes with an upload: what was sent with it, or what its manifest states.

    Raises BadRequest where the manifest's is none, or is another one.
    """
    if stated is not None and not FINGERPRINT.fullmatch(stated):
        raise BadRequest(
            "manifest.json: 'base_fingerprint' must be 64 lower-case hex digits, perhaps with 'packed-' before them: "
            "GET /v1/models shows that of the base.",
            param="base_fingerprint",
        )
    if sent is not None and stated not in (None, sent):
        raise BadRequest(
            "'base_fingerprint' is one thing in the request and another in manifest.json: send one of them, or make "
            "them agree.",
            param="base_fingerprint",
        )
    return sent or stated
