"""Tiny adapter folders, and a `load` that lowers them: real files, with no base and no PEFT."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from server.adapters.format.content import CONFIG_FILE, WEIGHTS_FILE
from server.adapters.method import Edit, Lowered
from server.adapters.store.folder_store import Incoming, Store
from server.ground.errors import AdapterRejected

WIDTH = 8


def tensors_from(seed: int, rank: int = 2) -> dict[str, torch.Tensor]:
    """What the adapter made from `seed` holds: `down` and `up`, both (rank, WIDTH)."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(rank, WIDTH, generator=generator) for name in ("down", "up")}


def write_folder(folder: Path, seed: int, *, rank: int = 2) -> Path:
    """An adapter folder whose content depends on seed and rank alone.

    What is there is replaced by new files, not overwritten: two writings may fall into one tick of the file system's
    clock, and then only the inode tells that there were two.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "r": rank, "base_model_name_or_path": "tiny-base"}
    (folder / "new-config").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors_from(seed, rank), str(folder / "new-weights"))
    (folder / "new-config").replace(folder / CONFIG_FILE)
    (folder / "new-weights").replace(folder / WEIGHTS_FILE)
    return folder


def incoming_from(store: Store, folder: Path) -> Incoming:
    """The folder's files as an upload that has just arrived."""
    incoming = store.incoming()
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        with incoming.open_file(name) as file:
            file.write((folder / name).read_bytes())
    return incoming


def load_folder(folder: Path) -> Lowered:
    """One edit at one site. Raises AdapterRejected for a config of another type, as lowering does."""
    config = json.loads((folder / CONFIG_FILE).read_bytes())
    if config["peft_type"] != "LORA":
        raise AdapterRejected(f"peft_type {config['peft_type']} is not served.")
    tensors = load_file(str(folder / WEIGHTS_FILE))
    edit = Edit(down=tensors["down"], up=tensors["up"])
    return Lowered("lora", edit.rank, 2 * edit.rank * WIDTH, {"layers.0.q_proj": edit})
