"""What is kept of the chat templates of adapters, while many threads ask for them."""

from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from server.api.adapter_templates import AdapterTemplates


class Emptied(OrderedDict[Any, Any]):
    """Another thread throws out what was found, right after it was found."""

    def __contains__(self, key: object) -> bool:
        is_there = super().__contains__(key)
        self.clear()
        return is_there


def test_a_template_may_be_thrown_out_while_it_is_looked_for(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("x")
    info = SimpleNamespace(folder=tmp_path, name="a")
    services: Any = SimpleNamespace(
        registry=SimpleNamespace(describe=lambda spec: info),
        tokenizer=SimpleNamespace(template=lambda text, owner: SimpleNamespace(text=text)),
    )
    templates = AdapterTemplates(services)
    templates._kept = Emptied()
    first = templates.find("a")
    assert first is not None
    assert templates.find("a") is first  # and is read once, as long as it is kept
