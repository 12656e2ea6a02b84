"""The report's table of each layer's gradients and activations, where the run wrote statistics.jsonl."""

from html import escape
from pathlib import Path

from megatron_joy.report import text
from megatron_joy.report.jsonl import tail_rows
from megatron_joy.report.tables import section, table

STATISTICS_FILE = "statistics.jsonl"  # in a run's folder
_COMPARED = 20  # rows before the newest that it is held against


def layers(folder: Path) -> str:
    """One row a layer: the newest statistics, its gradient norm also over the median of the rows before."""
    rows = tail_rows(folder / STATISTICS_FILE, _COMPARED + 1)
    if not rows or not isinstance(rows[-1].get("layers"), dict):
        return ""
    newest, cells = rows[-1], []
    for name, values in newest["layers"].items():
        before = sorted(
            row["layers"][name]["gradient_norm"]
            for row in rows[:-1]
            if row.get("layers", {}).get(name, {}).get("gradient_norm") is not None
        )
        norm = values.get("gradient_norm")
        usual = before[len(before) // 2] if before else None
        ratio = f"{norm / usual:.2f}×" if norm is not None and usual else text.MISSING
        output = [text.general(values.get(key)) for key in ("rms", "largest")]
        cells.append([escape(name), text.general(norm), ratio, *output])
    head = ("Layer", "Gradient norm", "Over its median", "Output RMS", "Output largest")
    body = table(head, cells, numeric=(1, 2, 3, 4))
    note = f"step {newest['step']:,}; attention and feed-forward count apart; statistics.jsonl has all"
    return section("layers", "Layers", body, folded=len(cells) > 12, note=note)
