"""The report for people and for programs: a table, and JSON.

Owns how the figures are written. Knows nothing about how they were made.
"""

import importlib.metadata
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from server import __version__
from server.drift.figures import Figures
from server.drift.measure import Ran, Report

_VERSIONED = ("torch", "transformers", "bitsandbytes")


def as_table(report: Report) -> str:
    """Two tables, the figures and the same by position, under a heading that says what was compared."""
    base = report.rows[0]
    num_prompts = len(report.request.prompts.prompts)
    cut = f", {report.num_truncated} of them cut" if report.num_truncated else ""
    head = [
        f"served     {_ran(report.served)}",
        f"reference  {_ran(report.reference)}",
        f"prompts    {report.request.prompts.path}: {num_prompts}{cut}; {base.num_tokens} positions, "
        f"{base.num_scored_tokens} tokens scored",
        "",
        "KL(reference || served) in nats per token, top-1 agreement, perplexity of the prompts",
        "",
    ]
    titles = ["", "mean KL", "median", "p99", "max", "x base", "top-1", "ppl ref", "ppl served"]
    rows = [titles, *(_cells(row) for row in report.rows)]
    by_place = [["mean KL by quarter of the prompt", "1st", "2nd", "3rd", "4th"]]
    by_place += [[_name(row), *(_number(quarter.mean_kl) for quarter in row.quarters)] for row in report.rows]
    return "\n".join([*head, *_aligned(rows), "", *_aligned(by_place), ""])


def as_json(report: Report) -> str:
    """The same and more, for programs; null where there is no finite figure."""
    request = report.request
    content = {
        "graftserve": __version__,
        "versions": {name: importlib.metadata.version(name) for name in _VERSIONED},
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "served": asdict(report.served),
        "reference": asdict(report.reference),
        "prompts": {
            "file": str(request.prompts.path),
            "sha256": request.prompts.sha256,
            "num_prompts": len(request.prompts.prompts),
            "num_truncated": report.num_truncated,
            "max_tokens_per_prompt": request.max_tokens_per_prompt,
        },
        "limits": asdict(request.limits),
        "rows": [_flat(row) for row in report.rows],
        "is_within_limits": not report.breaches,
        "breaches": report.breaches,
    }
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def _flat(row: Figures) -> dict[str, Any]:
    fields = asdict(row)
    subject = fields.pop("subject")
    return {"adapter": subject["name"], "version": subject["version"], "method": subject["method"], **fields}


def _cells(row: Figures) -> list[str]:
    return [
        _name(row),
        *map(_number, (row.mean_kl, row.median_kl, row.p99_kl, row.max_kl)),
        "-" if row.kl_of_base is None else f"{row.kl_of_base:.2f}",
        f"{row.agreement:.2%}",
        *map(_perplexity, (row.reference_perplexity, row.served_perplexity)),
    ]


def _name(row: Figures) -> str:
    return "(base)" if row.subject.name is None else row.subject.name


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _perplexity(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _ran(ran: Ran) -> str:
    return f"{ran.model}: {ran.quantization}, {ran.dtype} on {ran.device}, {ran.weight_bytes / 2**20:,.0f} MiB"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
