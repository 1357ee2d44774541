"""The demo's adapters belong to the demo's base, and the files say so."""

import shutil
from pathlib import Path

from transformers import AutoConfig

from server.adapters.registry import claim_of
from server.adapters.served_base import ServedBase
from server.adapters.store.folder_store import Store
from server.model.fingerprint import fingerprint
from tests.demo_files import ADAPTERS, BASE, STORE


def test_the_demos_adapters_carry_the_fingerprint_of_its_base_and_draw_no_warning(tmp_path: Path) -> None:
    own = fingerprint(str(BASE), AutoConfig.from_pretrained(BASE))
    assert own is not None
    base = ServedBase((BASE.name,), own)
    store = Store(Path(shutil.copytree(STORE, tmp_path / "store")), create=False)  # opening one may clear it up
    stored = {adapter.name: adapter.versions[-1].record for adapter in store.scan()}
    assert set(ADAPTERS) <= stored.keys()
    for name in ADAPTERS:
        assert stored[name].checked_fingerprint == own, "run python -m demo.install"
        assert base.doubts(claim_of(stored[name])) == ()
