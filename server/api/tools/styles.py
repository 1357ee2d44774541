"""The styles of calls that are read, and which of them a model has."""

from server.api.tools.hermes import HERMES
from server.api.tools.llama import LLAMA
from server.api.tools.mistral import MISTRAL
from server.api.tools.style import ToolStyle
from server.model.chat_template import ChatTemplate

# In this order a template is asked: what Hermes and Mistral teach is a mark that nobody else has.
STYLES = {style.name: style for style in (HERMES, MISTRAL, LLAMA)}
AUTO = "auto"


def style_of(template: ChatTemplate, chosen: str) -> ToolStyle | None:
    """`chosen` by the operator, or else what the template teaches; None where it shows the model no tools."""
    if "tools" not in template.variables:
        return None
    if chosen != AUTO:
        return STYLES[chosen]
    return next((style for style in STYLES.values() if style.is_taught_by(template)), None)
