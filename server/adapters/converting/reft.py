"""ReFT out of pyreft's folder into the documented one: a config, and safetensors by layer.

Owns the format that `docs/convert.md` describes, and the questions that pyreft's folder leaves open. Knows nothing
about how they are asked, or how the result is served.

Wu et al. 2024, "ReFT: Representation Finetuning for Language Models", arXiv:2404.03592.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from server.adapters.converting.pickles import PickleLimits, read_pickles
from server.adapters.converting.pyreft_folder import PyreftFolder
from server.adapters.format.content import CONFIG_FILE, WEIGHTS_FILE
from server.adapters.merging.lora_folder import new_folder
from server.adapters.positions import prompt_ends
from server.ground.errors import AdapterRejected, BadRequest
from server.ops.site_ops.bottleneck import NAMES

LAST_POSITIONS = ("prompt", "prompt-1")
APPLIES_TO = ("prompt", "generated")
_LINEAR = "linear"
_WITHOUT_ACTIVATION = ("consreft", "lobireft")
# Of each kind: pyreft's name -> ours. All that is left out of a file, or beyond these, is refused, but for _NO_EFFECT.
_SOURCE = {"learned_source.weight": "weight", "learned_source.bias": "bias"}
_ROTATION = {
    "rotate_layer.parametrizations.weight.original": "original",
    "rotate_layer.parametrizations.weight.0.base": "base",
}
_NAMES: Mapping[str, Mapping[str, str]] = {
    "loreft": {"weight": "weight", "bias": "bias", "rotate_layer": "rotate_layer"},
    "noreft": _SOURCE | {"proj_layer.weight": "proj_layer.weight", "proj_layer.bias": "proj_layer.bias"},
    "nodireft": _SOURCE | {"proj_layer.weight": "proj_layer.weight"},
    "direft": _SOURCE | _ROTATION,
    "consreft": _ROTATION | {"learned_source": "bias"},
    "lobireft": _ROTATION | {"learned_source": "bias"},
}
_OPTIONAL = ("proj_layer.bias",)
_NO_EFFECT = {"nodireft": ("proj_layer.bias",)}  # saved, but not in its formula


@dataclass(frozen=True, slots=True)
class Positions:
    """The first and the last tokens of a prompt: "f7+l7", "f7" or "l1"."""

    num_first: int
    num_last: int

    @classmethod
    def of(cls, text: str) -> "Positions":
        """Raises BadRequest for what is no such text, and for no position at all."""
        ends = prompt_ends(text)
        if ends is None or ("+" in text) != ("f" in text and "l" in text):
            raise BadRequest(
                f"--positions {text!r:.40}: write f7+l7 for the first 7 and the last 7 tokens of the prompt, or f7 or "
                "l7 alone.",
                param="positions",
            )
        return cls(*ends)

    def __str__(self) -> str:
        named = (("f", self.num_first), ("l", self.num_last))
        return "+".join(f"{letter}{num}" for letter, num in named if num)

    @property
    def has_both(self) -> bool:
        return self.num_first > 0 and self.num_last > 0


@dataclass(frozen=True, slots=True)
class Training:
    """How the adapter was trained, as far as pyreft does not save it. None: not said."""

    positions: Positions | None = None
    share_weights: bool | None = None
    activation: str | None = None  # "linear" is none
    last_position: str | None = None
    applies_to: str = "prompt"
    base_model: str | None = None


@dataclass(frozen=True, slots=True)
class Converted:
    """What was written."""

    kind: str
    rank: int  # the largest
    width: int
    layers: tuple[int, ...]
    num_parameters: int


def open_questions(folder: PyreftFolder, known: Training) -> tuple[str, ...]:
    """The fields of `known` that have to be said before `convert` can be called, in the order to ask for them."""
    is_of_prompt = known.applies_to == "prompt"
    is_needed = {
        "positions": is_of_prompt,
        # Two interventions at one layer are those of a prefix and of a suffix.
        "share_weights": is_of_prompt and (known.positions or Positions(1, 1)).has_both and not _has_twice(folder),
        "activation": folder.kind not in _WITHOUT_ACTIVATION,
        "last_position": is_of_prompt,
    }
    return tuple(name for name, needed in is_needed.items() if needed and getattr(known, name) is None)


def convert(folder: PyreftFolder, training: Training, target: Path, limits: PickleLimits | None = None) -> Converted:
    """Writes the adapter as the new folder `target`; equal arguments give equal bytes.

    Raises BadRequest for a field of `training` that does not go with the folder or is not said, AdapterRejected for the
    folder's files; then nothing is left behind.
    """
    with new_folder(target) as out:
        training = _settled(folder, training)
        parts = _parts(folder, training)
        read = read_pickles([intervention.file for intervention in folder.interventions], limits)
        tensors: dict[str, torch.Tensor] = {}
        for intervention, part, found in zip(folder.interventions, parts, read, strict=True):
            for name, tensor in _tensors(folder.kind, found, intervention.file.name).items():
                tensors[f"layers.{intervention.layer}.{part}.{name}"] = tensor
        rank, width = _widths(tensors)
        layers = tuple(sorted({intervention.layer for intervention in folder.interventions}))
        config = {
            "peft_type": "LOREFT",
            "intervention": folder.kind,
            "r": rank,
            "layers": list(layers),
            "positions": None if training.positions is None else str(training.positions),
            "share_weights": training.share_weights,
            "activation": None if training.activation == _LINEAR else training.activation,
            "last_position": training.last_position,
            "applies_to": training.applies_to,
            "base_model_name_or_path": training.base_model,
        }
        (out / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, str(out / WEIGHTS_FILE), metadata={"format": "pt"})
    return Converted(folder.kind, rank, width, layers, sum(tensor.numel() for tensor in tensors.values()))


# What was said


def _has_twice(folder: PyreftFolder) -> bool:
    return len({intervention.layer for intervention in folder.interventions}) < len(folder.interventions)


def _settled(folder: PyreftFolder, training: Training) -> Training:
    """The training with what follows from the folder filled in."""
    if missing := open_questions(folder, training):
        raise BadRequest(f"{missing[0]}: pyreft does not save it; say it.", param=missing[0])
    _check_activation(folder.kind, training.activation)
    if training.applies_to == "generated":
        if training.positions is not None:
            raise BadRequest(
                "--positions: an adapter that applies to generated tokens applies to each of them. Leave it out, or "
                "give --applies-to prompt.",
                param="positions",
            )
        training = replace(training, last_position=training.last_position or LAST_POSITIONS[0])
    has_both = training.positions is not None and training.positions.has_both
    share = training.share_weights
    if share is None:
        share = not (has_both and _has_twice(folder))
    return replace(training, share_weights=share if has_both else True)


def _check_activation(kind: str, activation: str | None) -> None:
    if activation is None:
        return
    if activation != _LINEAR and kind in _WITHOUT_ACTIVATION:
        raise BadRequest(f"--activation {activation}: {kind} has none. Leave it out.", param="activation")
    if activation not in NAMES:
        known = ", ".join(sorted(NAMES))
        raise BadRequest(f"--activation {activation!r:.40} cannot be served: {known} can.", param="activation")


def _parts(folder: PyreftFolder, training: Training) -> Sequence[str]:
    """The part of each intervention: with weights of their own, the first half are the prefixes (see pyreft's
    `get_intervention_locations`)."""
    num = len(folder.interventions)
    parts = ["all"] * num if training.share_weights else ["prefix"] * (num // 2) + ["suffix"] * (num // 2)
    if len(parts) != num:
        raise BadRequest(
            f"share_weights: without it the first half of the interventions are for prefixes and the second for "
            f"suffixes, and the folder has {num}, an odd number. Was it trained with --share-weights?",
            param="share_weights",
        )
    pairs = zip(folder.interventions, parts, strict=True)
    (layer, _), num_at_most = Counter((one.layer, part) for one, part in pairs).most_common(1)[0]
    if num_at_most > 1:
        raise BadRequest(
            f"positions: the folder has two interventions at layer {layer}, which are those of the first and of the "
            "last positions. Give both, as f7+l7, and --no-share-weights.",
            param="positions",
        )
    return parts


# The tensors


def _tensors(kind: str, found: Mapping[str, torch.Tensor], file: str) -> dict[str, torch.Tensor]:
    """A file's tensors under our names, float32: `weight` and `proj_layer.weight` (r, h), biases (r,), `rotate_layer`
    (h, r)."""
    names = _NAMES[kind]
    strange = sorted(found.keys() - names.keys() - set(_NO_EFFECT.get(kind, ())))
    lacking = sorted(names.keys() - found.keys() - set(_OPTIONAL))
    if strange or lacking:
        problem = f"has {strange[0]}, which is none" if strange else f"lacks {lacking[0]}, which is one"
        raise AdapterRejected(
            f"{file} {problem} of the tensors of {kind}: it is of another class or version of pyreft."
        )
    tensors = {ours: found[theirs] for theirs, ours in names.items() if theirs in found}
    if "original" in tensors:
        original, base = tensors.pop("original"), tensors.pop("base")
        _check(file, original.ndim == 2 and base.shape == (len(original), len(original)) and _is_tall(original))
        tensors["rotate_layer"] = rotation(original, base)
    _check_shapes(tensors, file)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def rotation(original: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """R (h, r) with orthonormal columns out of what torch.nn.utils.parametrizations.orthogonal keeps of it.

    `original` (h, r) has Householder vectors below its diagonal and signs on it, `base` (h, h) is the rotation at the
    beginning; where h = r, `original` holds a skew matrix instead.
    """
    if original.shape[0] == original.shape[1]:
        skew = original.tril()
        turned: torch.Tensor = torch.matrix_exp(skew - skew.T)
    else:
        below = original.tril(-1)
        scales = 2 / (1 + below.square().sum(0))
        turned = torch.linalg.householder_product(below, scales) * original.diagonal().int()
    return base @ turned


def _is_tall(matrix: torch.Tensor) -> bool:
    return matrix.shape[0] >= matrix.shape[1] >= 1


def _check_shapes(tensors: Mapping[str, torch.Tensor], file: str) -> None:
    matrices = [tensor.T if name == "rotate_layer" else tensor for name, tensor in tensors.items() if tensor.ndim == 2]
    vectors = [tensor for tensor in tensors.values() if tensor.ndim != 2]
    _check(file, bool(matrices) and matrices[0].shape[1] >= matrices[0].shape[0] >= 1)
    _check(file, all(matrix.shape == matrices[0].shape for matrix in matrices))
    _check(file, all(vector.shape == matrices[0].shape[:1] for vector in vectors))
    is_matrix = {name: tensor.ndim == 2 for name, tensor in tensors.items()}
    _check(file, all(is_matrix[name] != name.endswith("bias") for name in tensors))


def _check(file: str, is_right: bool) -> None:
    if not is_right:
        raise AdapterRejected(f"{file}: the shapes of its tensors do not go together. Save the adapter again.")


def _widths(tensors: Mapping[str, torch.Tensor]) -> tuple[int, int]:
    """(the largest rank, the hidden width), which must be one."""
    matrices = [tensor for tensor in tensors.values() if tensor.ndim == 2]
    widths = {max(matrix.shape) for matrix in matrices}
    if len(widths) > 1:
        raise AdapterRejected(f"The interventions are of several widths, {sorted(widths)}: they are of two models.")
    return max(min(matrix.shape) for matrix in matrices), widths.pop()
