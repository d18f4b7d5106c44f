"""Measures the exported checkpoint on held-out problems and writes the tables of its card between the marks in README.md.

python -m training.card --count 400
"""

import argparse
import re
from pathlib import Path

import torch
from torch import Tensor

from training import export
from training.evaluate import Heldout
from training.model import Shape
from training.text import TINY


def load_table(loads: Tensor) -> str:
    """Per layer, the share of the choices that the least, the mean and the most used expert got."""
    lines = ["| layer | min | mean | max | dead experts |", "| --- | --- | --- | --- | --- |"]
    for layer, row in enumerate((loads / loads.sum(-1, keepdim=True)).tolist()):
        dead = sum(share == 0 for share in row)
        lines.append(f"| {layer} | {min(row):.4f} | {sum(row) / len(row):.4f} | {max(row):.4f} | {dead or 'none'} |")
    return "\n".join(lines)


def accuracy_table(shares: dict[str, float], numbers: dict[str, int]) -> str:
    lines = ["| held-out problems | number | all gold tokens predicted |", "| --- | --- | --- |"]
    lines += [f"| {name} | {numbers[name]} | {share:.3f} |" for name, share in shares.items()]
    return "\n".join(lines)


def counts(heldout: Heldout) -> dict[str, int]:
    """How many problems each line of the table is measured on."""
    found: dict[str, int] = {}
    for row in heldout.rows:
        for *_, category in row.spans:
            found[category] = found.get(category, 0) + 1
    found["arithmetic"] = sum(number for name, number in found.items() if name.startswith(("arithmetic-", "follow-up")))
    found["tools"] = sum(number for name, number in found.items() if name.startswith("tools-"))
    return found


def replace(text: str, mark: str, table: str) -> str:
    return re.sub(rf"(<!-- {mark} -->\n).*?(\n<!-- end -->)", lambda match: match[1] + table + match[2], text, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=400, help="held-out problems of each kind")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=TINY)
    parser.add_argument("--write", action="store_true", help="put the tables into the folder's README.md")
    options = parser.parse_args()
    model = export.load(options.folder / "model.safetensors", Shape())
    model.exact = True
    heldout = Heldout("cpu", options.count, options.seed)
    with torch.no_grad():
        shares, loads = heldout.exact(model, size=4)
    tables = {"accuracy": accuracy_table(shares, counts(heldout)), "loads": load_table(loads)}
    print("\n\n".join(tables.values()))
    if options.write:
        text = (options.folder / "README.md").read_text()
        for mark, table in tables.items():
            text = replace(text, mark, table)
        (options.folder / "README.md").write_text(text)


if __name__ == "__main__":
    main()
