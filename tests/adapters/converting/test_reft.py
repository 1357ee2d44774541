"""`graft convert reft`: folders laid out as pyreft 0.1.0 writes them, and what is refused of them.

The layout was taken from folders that pyreft wrote; its classes are not needed here. The relatives of LoReFT keep their
rotation in torch's own orthogonal parametrization, which is the oracle.
"""

import io
import json
import os
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers.activations import ACT2FN

from server.adapters.converting import pickles
from server.adapters.converting.pickles import PickleLimits, read_pickles
from server.adapters.converting.pyreft_folder import PyreftFolder
from server.adapters.converting.reft import Positions, Training, convert, open_questions, rotation
from server.adapters.format.content import CONFIG_FILE, WEIGHTS_FILE
from server.cli import main
from server.ground.errors import AdapterRejected, BadRequest, GraftError
from server.ops.site_ops.bottleneck import NAMES

H, R = 16, 3
PROMPT = Training(Positions(7, 7), None, "linear", "prompt")
_BLOCK = "block_output"


def orthogonal(seed: int, rank: int = R) -> nn.Module:
    """A rotation as pyreft keeps it, moved away from where it began."""
    torch.manual_seed(seed)
    layer = nn.Module()
    layer.weight = nn.Parameter(torch.randn(H, rank))
    layer = nn.utils.parametrizations.orthogonal(layer)
    with torch.no_grad():
        layer.parametrizations.weight.original.add_(torch.randn(H, rank).tril(-1) * 0.3)
    return layer


def state_of(kind: str, seed: int) -> dict[str, torch.Tensor]:
    """What pyreft's classes give to torch.save."""
    torch.manual_seed(seed)
    source = {"learned_source.weight": torch.randn(R, H), "learned_source.bias": torch.randn(R)}
    projection = {"proj_layer.weight": torch.randn(R, H), "proj_layer.bias": torch.randn(R)}
    rotation = {f"rotate_layer.{name}": tensor for name, tensor in orthogonal(seed).state_dict().items()}
    sizes = {"embed_dim": torch.tensor(H), "interchange_dim": torch.tensor(H)}
    return {
        "Loreft": {
            "weight": torch.randn(R, H).bfloat16(), "bias": torch.randn(R).bfloat16(),
            "rotate_layer": orthogonal(seed).weight.detach(),
        },
        "Noreft": sizes | source | projection,
        "Nodireft": sizes | source | projection,
        "Direft": sizes | source | rotation,
        "Consreft": sizes | rotation | {"learned_source": torch.randn(R)},
        "Lobireft": sizes | rotation | {"learned_source": torch.randn(R)},
    }[kind]  # fmt: skip


def write_pyreft(
    folder: Path, layers: Sequence[int], kind: str = "Loreft", component: str = _BLOCK, **changed: Any
) -> Path:
    """A folder as ReftModel.save writes it, an intervention for each of `layers` in their order."""
    folder.mkdir()
    for number, layer in enumerate(layers):
        dotted = component.format(layer)
        place = f"layer_{layer}_comp_{_BLOCK}" if component == _BLOCK else f"comp_{dotted.replace('.', '_')}"
        count = list(layers[:number]).count(layer)
        torch.save(state_of(kind, number), folder / f"intkey_{place}_unit_pos_nunit_1#{count}.bin")
    config: dict[str, Any] = {
        "intervention_types": [f"<class 'pyreft.interventions.{kind}Intervention'>"] * len(layers),
        "intervention_dimensions": [H] * len(layers),
        "intervention_constant_sources": [True] * len(layers),
        "mode": "parallel",
        "representations": [[layer, component.format(layer), "pos", 1, R, *[None] * 9] for layer in layers],
        "transformers_version": "4.40.0",
    }
    (folder / "config.json").write_text(json.dumps(config | changed))
    return folder


def converted(folder: Path, out: Path, training: Training = PROMPT) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    convert(PyreftFolder.open(folder), training, out)
    return json.loads((out / CONFIG_FILE).read_bytes()), load_file(out / WEIGHTS_FILE)


# What is written


def test_prefix_and_suffix_have_weights_of_their_own(tmp_path: Path) -> None:
    """In pyreft's order: the first half of the interventions are those of the first positions."""
    folder = write_pyreft(tmp_path / "pyreft", [0, 2, 0, 2])
    asked = ["convert", "reft", str(folder), str(tmp_path / "out"), "--positions", "f7+l5", "--activation", "linear"]
    assert main([*asked, "--last-position", "prompt-1", "--base", "org/base"]) == 0
    assert json.loads((tmp_path / "out" / CONFIG_FILE).read_bytes()) == {
        "peft_type": "LOREFT", "intervention": "loreft", "r": R, "layers": [0, 2], "positions": "f7+l5",
        "share_weights": False, "activation": None, "last_position": "prompt-1", "applies_to": "prompt",
        "base_model_name_or_path": "org/base",
    }  # fmt: skip
    tensors = load_file(tmp_path / "out" / WEIGHTS_FILE)
    assert len(tensors) == 12
    for number, part in enumerate(["layers.0.prefix", "layers.2.prefix", "layers.0.suffix", "layers.2.suffix"]):
        for name, tensor in state_of("Loreft", number).items():
            assert torch.equal(tensors[f"{part}.{name}"], tensor.float())


def test_relatives_are_written_under_the_same_names(tmp_path: Path) -> None:
    """DiReFT's rotation is rebuilt from what torch keeps of it; dotted components name the layer."""
    folder = write_pyreft(tmp_path / "pyreft", [1], "Direft", component="model.layers[{}].output")
    config, tensors = converted(folder, tmp_path / "out", Training(Positions(0, 1), None, "relu", "prompt"))
    assert (config["intervention"], config["positions"], config["activation"]) == ("direft", "l1", "relu")
    assert config["share_weights"] is True
    assert tensors.keys() == {"layers.1.all.weight", "layers.1.all.bias", "layers.1.all.rotate_layer"}
    expected = orthogonal(0).weight.detach()
    assert torch.allclose(tensors["layers.1.all.rotate_layer"], expected, atol=1e-6)
    assert torch.equal(tensors["layers.1.all.weight"], state_of("Direft", 0)["learned_source.weight"])


@pytest.mark.parametrize("rank", [1, R, H])
def test_a_rotation_is_rebuilt_as_torch_does_it(rank: int) -> None:
    layer = orthogonal(4, rank)
    kept = layer.parametrizations.weight
    found = rotation(kept.original.detach(), kept[0].base)
    assert torch.allclose(found, layer.weight, atol=1e-6)
    assert torch.allclose(found.T @ found, torch.eye(rank), atol=1e-5)


# What is asked for


@pytest.mark.parametrize(
    ("layers", "kind", "known", "questions"),
    [
        ([0, 1], "Loreft", Training(), ("positions", "share_weights", "activation", "last_position")),
        ([0, 0], "Loreft", Training(), ("positions", "activation", "last_position")),
        ([0, 1], "Loreft", Training(Positions(7, 0)), ("activation", "last_position")),
        ([0, 1], "Loreft", Training(Positions(7, 7), activation="relu"), ("share_weights", "last_position")),
        ([0], "Lobireft", Training(Positions(1, 0), last_position="prompt"), ()),
        ([0], "Loreft", Training(applies_to="generated"), ("activation",)),
    ],
)
def test_only_what_the_folder_does_not_tell_is_asked_for(
    layers: list[int], kind: str, known: Training, questions: tuple[str, ...], tmp_path: Path
) -> None:
    assert open_questions(PyreftFolder.open(write_pyreft(tmp_path / "pyreft", layers, kind)), known) == questions


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_at_a_terminal_the_command_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One intervention at each layer, not shared: the first half of the layers has prefixes, the second suffixes.

    NodiReFT saves a bias of its projection that its formula does not have; it is left out.
    """
    folder = write_pyreft(tmp_path / "pyreft", [3, 4], "Nodireft")
    monkeypatch.setattr(sys, "stdin", Terminal("f1+l1\nperhaps\nno\n\nprompt\n"))
    assert main(["convert", "reft", str(folder), str(tmp_path / "out")]) == 0
    captured = capsys.readouterr()
    assert "'perhaps' is no answer" in captured.err
    assert captured.out == f"{tmp_path / 'out'}: nodireft, rank 3, width 16, layers 3, 4, 198 parameters\n"
    config = json.loads((tmp_path / "out" / CONFIG_FILE).read_bytes())
    assert (config["positions"], config["share_weights"], config["activation"]) == ("f1+l1", False, None)
    names = ("weight", "bias", "proj_layer.weight")
    assert load_file(tmp_path / "out" / WEIGHTS_FILE).keys() == {
        f"layers.{part}.{name}" for part in ("3.prefix", "4.suffix") for name in names
    }


@pytest.mark.parametrize(
    ("flags", "flag"),
    [
        ([], "--positions f7+l7"),
        (["--positions", "f7+l7"], "--share-weights or --no-share-weights"),
        (["--positions", "f7"], "--activation linear"),
        (["--positions", "f7", "--activation", "relu"], "--last-position prompt or"),
    ],
)
def test_elsewhere_the_refusal_names_the_flag(
    flags: list[str], flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_pyreft(tmp_path / "pyreft", [0, 1])
    monkeypatch.setattr(sys, "stdin", io.StringIO("f7\n"))
    assert main(["convert", "reft", str(folder), str(tmp_path / "out"), *flags]) == 2
    assert flag in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["", "7", "f", "f0", "f0+l0", "f7l7", "l7+f7", "f7+", "+l7", "f-1", "f7+l7+l8", "f٣"])
def test_positions_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(BadRequest, match="write f7"):
        Positions.of(text)


@pytest.mark.parametrize(("text", "written"), [("f7+l7", "f7+l7"), ("f7", "f7"), ("l1", "l1"), ("f0+l2", "l2")])
def test_positions_are_written_in_one_way(text: str, written: str) -> None:
    assert str(Positions.of(text)) == written


@pytest.mark.parametrize(
    ("layers", "kind", "training", "words"),
    [
        ([0, 0], "Loreft", Training(Positions(7, 0), None, "linear", "prompt"), "two interventions at layer 0"),
        ([0, 0], "Loreft", Training(Positions(7, 7), True, "linear", "prompt"), "two interventions at layer 0"),
        ([0, 1, 2], "Loreft", Training(Positions(7, 7), False, "linear", "prompt"), "an odd number"),
        ([0], "Loreft", Training(Positions(7, 0), None, "swosh", "prompt"), "cannot be served: .*relu"),
        ([0], "Lobireft", Training(Positions(7, 0), None, "relu", "prompt"), "lobireft has none"),
        ([0], "Loreft", Training(Positions(7, 0), None, "relu", None, "generated"), "applies to each of them"),
        ([0], "Loreft", Training(Positions(7, 0)), "activation: pyreft does not save it"),
    ],
)
def test_a_training_that_does_not_go_with_the_folder_is_refused(
    layers: list[int], kind: str, training: Training, words: str, tmp_path: Path
) -> None:
    folder = PyreftFolder.open(write_pyreft(tmp_path / "pyreft", layers, kind))
    with pytest.raises(BadRequest, match=words):
        convert(folder, training, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["pyreft"]


# Hostile and unlucky folders


def _representation(**fields: Any) -> dict[str, Any]:
    entry = {"layer": 0, "component": _BLOCK, "unit": "pos", "max_number_of_units": 1} | fields
    return {"representations": [list(entry.values())]}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"representations": []}, "a list of 1 to"),
        ({"representations": None}, "a list of 1 to"),
        ({"representations": [7]}, "pyreft's entries"),
        ({"mode": "serial"}, "mode = 'serial'"),
        ({"intervention_types": ["<class '__main__.LoreftIntervention'>"]}, "whose formula is not known"),
        ({"intervention_types": ["<class 'pyreft.interventions.MyIntervention'>"]}, "whose formula is not known"),
        ({"intervention_types": []}, "a class for each representation"),
        (_representation(component="mlp_output"), "only interventions on the output of decoder layers"),
        (_representation(component="../../etc/layers[0].output"), "only interventions on the output"),
        (_representation(layer="0"), "only interventions on the output"),
        (_representation(layer=1), "intkey_layer_1_.* is missing"),
        (_representation(unit="h.pos"), "of the unit pos"),
        ({"representations": [[0, _BLOCK, "pos", 1, R, None, None, [[0, 2]], *[None] * 6]]}, "sets subspace_partition"),
    ],
)
def test_a_config_of_another_kind_is_refused(changed: Mapping[str, Any], words: str, tmp_path: Path) -> None:
    folder = write_pyreft(tmp_path / "pyreft", [0], **changed)
    with pytest.raises(AdapterRejected, match=words):
        PyreftFolder.open(folder)


def test_other_files_are_not_passed_over(tmp_path: Path) -> None:
    folder = write_pyreft(tmp_path / "pyreft", [0])
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(AdapterRejected, match="weights of the base were trained"):
        PyreftFolder.open(folder)
    (folder / "intkey_layer_5_comp_block_output_unit_pos_nunit_1#0.bin").write_bytes(b"")
    with pytest.raises(AdapterRejected, match="is not in config.json"):
        PyreftFolder.open(folder)


@pytest.mark.parametrize("content", [b"", b"[" * 100_000, b"[]", b"\xff", b" " * (1 << 21)])
def test_a_config_that_is_none_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(AdapterRejected, match=r"config.json"):
        PyreftFolder.open(tmp_path)


def test_the_folder_inside_is_proposed(tmp_path: Path) -> None:
    write_pyreft(tmp_path / "intervenable_model", [0])
    with pytest.raises(AdapterRejected, match="perhaps intervenable_model"):
        PyreftFolder.open(tmp_path)


class _Program:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._path),)


def test_what_the_server_would_refuse_at_the_upload_is_not_converted(tmp_path: Path) -> None:
    folder = PyreftFolder.open(write_pyreft(tmp_path / "pyreft", [0]))
    unserved = ACT2FN.keys() - NAMES.keys()
    assert "hardswish" in unserved
    for name in unserved:
        with pytest.raises(BadRequest, match="cannot be served"):
            convert(folder, Training(Positions(7, 0), None, name, "prompt"), tmp_path / "out")


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("raise ImportError('libtorch.so: cannot open shared object file')", "status 1, .*libtorch.so: cannot open"),
        ("import sys; sys.exit(3)", "status 3, and last wrote 'it wrote nothing'"),
        ("import sys; sys.exit('\\x1b[2J' + 'x' * 9999)", r"status 1, and last wrote 'x{200}'"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGXCPU)", "was killed .*too much memory or time"),
    ],
)
def test_a_reader_that_does_not_start_says_why(
    program: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "reader.py").write_text(program)
    (tmp_path / "a.bin").write_bytes(b"")
    monkeypatch.setattr(pickles, "_PROGRAM", tmp_path / "reader.py")
    with pytest.raises(AdapterRejected, match=words):
        read_pickles([tmp_path / "a.bin"])


def test_a_reader_that_cannot_be_run_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.bin").write_bytes(b"")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(AdapterRejected, match="did not start: .*No such file"):
        read_pickles([tmp_path / "a.bin"])


def test_a_pickle_that_would_run_a_program_is_refused_by_its_name(tmp_path: Path) -> None:
    folder = write_pyreft(tmp_path / "pyreft", [0])
    (file,) = folder.glob("*.bin")
    torch.save({"weight": _Program(tmp_path / "ran")}, file)
    with pytest.raises(AdapterRejected, match=rf"{file.name}: it holds more than tensors".replace("#", r"\#")):
        convert(PyreftFolder.open(folder), Training(Positions(1, 0), None, "linear", "prompt"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["pyreft"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"weight": torch.zeros(1).expand(1 << 20, 1 << 20)}, "more numbers than the file has bytes"),
        ({"weight": torch.tensor([torch.nan])}, "NaN or infinity"),
        ({"weight": [torch.zeros(1)]}, "must hold tensors by name"),
        (torch.zeros(3), "no state dict"),
        ({f"t{number}": torch.zeros(1) for number in range(17)}, "at most 16"),
    ],
)
def test_what_is_no_state_dict_is_refused(content: Any, words: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.bin")
    with pytest.raises(AdapterRejected, match=words):
        read_pickles([tmp_path / "a.bin"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weight": None}, "lacks weight"),
        ({"extra": torch.zeros(3)}, "has extra"),
        ({"weight": torch.zeros(R, H + 1)}, "do not go together"),
        ({"bias": torch.zeros(R + 1)}, "do not go together"),
        ({"rotate_layer": torch.zeros(R, H)}, "do not go together"),
        ({"bias": torch.zeros(R, H)}, "do not go together"),
    ],
)
def test_tensors_of_another_class_or_shape_are_refused(
    changes: Mapping[str, torch.Tensor | None], words: str, tmp_path: Path
) -> None:
    folder = write_pyreft(tmp_path / "pyreft", [0])
    (file,) = folder.glob("*.bin")
    state = state_of("Loreft", 0) | changes
    torch.save({name: tensor for name, tensor in state.items() if tensor is not None}, file)
    with pytest.raises(AdapterRejected, match=words):
        convert(PyreftFolder.open(folder), Training(Positions(1, 0), None, "linear", "prompt"), tmp_path / "out")


@pytest.mark.slow
def test_a_file_that_asks_for_all_memory_ends_its_process_alone(tmp_path: Path) -> None:
    """Compressed, a gigabyte of zeros is a megabyte; torch's reader takes it for tensors."""
    torch.save({"weight": torch.zeros(1 << 28)}, tmp_path / "whole.bin")
    with (
        zipfile.ZipFile(tmp_path / "whole.bin") as whole,
        zipfile.ZipFile(tmp_path / "bomb.bin", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for name in whole.namelist():
            bomb.writestr(name, whole.read(name))
    assert (tmp_path / "bomb.bin").stat().st_size < 1 << 21
    with pytest.raises(GraftError, match=r"bomb.bin|ended"):
        read_pickles([tmp_path / "bomb.bin"])


def test_a_file_over_its_limit_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"x" * 100)
    with pytest.raises(AdapterRejected, match=r"a.bin has 100 bytes; the limit is 99"):
        read_pickles([tmp_path / "a.bin"], PickleLimits(max_file_bytes=99))
