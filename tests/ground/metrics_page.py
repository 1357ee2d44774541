"""The tables of docs/metrics.md, written from the definitions of the metrics.

`python -m tests.ground.metrics_page` writes them into the page; `test_metrics.py` holds the page to them.
"""

from collections.abc import Iterable
from pathlib import Path

from server.ground.families import FAMILIES, SECTIONS, Family
from server.ground.vllm_names import (
    ADMISSION_REASONS,
    BY_SOURCE,
    LOADED,
    REJECTIONS,
    REQUESTS_INFO,
    SAME,
    WAITING_BY_REASON,
)

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
BEGIN, END = "<!-- metrics: written by tests/ground/metrics_page.py -->\n", "<!-- end of metrics -->\n"
BEGIN_VLLM, END_VLLM = "<!-- vllm names: written by tests/ground/metrics_page.py -->\n", "<!-- end of vllm names -->\n"
_WAITING = "`deferred`: `graft_sequences_short_of_room`; `capacity`: the others of `graft_sequences_waiting`"
_SOURCES = (
    "`local_cache_hit`: `graft_prompt_tokens_cached_total`; `local_compute`: the others of `graft_prompt_tokens_total`"
)
_QUEUE = " and ".join(f"`{reason}`" for reason in ADMISSION_REASONS)


def tables() -> str:
    return "\n".join(f"## {title}\n\n{_table(section)}" for title, section in SECTIONS.items())


def vllm_table() -> str:
    rows = [f"| `{theirs}` | {FAMILIES[ours].kind} | `{ours}` |" for ours, theirs in SAME.items()]
    rows.append(f"| `{WAITING_BY_REASON}` | gauge: `reason` | {_WAITING} |")
    rows.append(f"| `{BY_SOURCE}` | counter: `source` | {_SOURCES} |")
    rows.append(f"| `{REJECTIONS}` | counter: `reason` | `graft_rejections_total`: {_QUEUE} |")
    rows.append(f"| `{LOADED}` | gauge: `adapter_name`, `level`, `pinned`, `rank` | `graft_adapter_loaded` |")
    labels = "`max_lora`, `running_lora_adapters`, `waiting_lora_adapters`"
    rows.append(f"| `{REQUESTS_INFO}` | gauge: {labels} | see below |")
    return "\n".join(["| vLLM's name | kind | is our |", "|---|---|---|", *rows]) + "\n"


def _table(families: Iterable[Family]) -> str:
    rows = [f"| `{one.name}` | {one.kind}{_labels(one)} | {_told(one.text)} |" for one in families]
    return "\n".join(["| metric | kind | what it tells |", "|---|---|---|", *rows]) + "\n"


def _told(text: str) -> str:
    """Without its full stop; its first word small, but for an abbreviation."""
    return text[:-1] if text[:2].isupper() else text[0].lower() + text[1:-1]


def _labels(family: Family) -> str:
    if not family.labels:
        return ""
    values = " = " + ", ".join(family.values) if family.values else ""
    return ": " + ", ".join(f"`{label}`" for label in family.labels) + values


def written(page: str) -> str:
    """The page with its tables as they should be."""
    for begin, end, content in ((BEGIN, END, tables()), (BEGIN_VLLM, END_VLLM, vllm_table())):
        before, _, rest = page.partition(begin)
        page = before + begin + content + end + rest.partition(end)[2]
    return page


def main() -> None:
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
