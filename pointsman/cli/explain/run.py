"""From the command line to a plan and its report. The exit code is 0 where the model runs, 1 where it does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from pointsman import tiny
from pointsman.cli.explain.options import ExplainOptions
from pointsman.cli.explain.picture import picture
from pointsman.cli.explain.remedies import remedies
from pointsman.cli.explain.report import Report
from pointsman.config import engine_config
from pointsman.engine.device_models import model_of
from pointsman.engine.plan import decode_floors, plan_on, prefill_floor
from pointsman.models import architecture_of
from pointsman.models.architecture import Architecture
from pointsman.models.folder import locate, read_json

CONTEXT = 1024
FILE_WIDTH = 120  # of what is no terminal


def run(engine: dict[str, Any], options: ExplainOptions) -> int:
    """Explain. Raises ValueError where the configuration cannot be read, or means nothing on the device."""
    named = engine.pop("model", None)
    if named is not None and options.checkpoint is not None:
        raise ValueError(f"the model is given twice, as {options.checkpoint!r} and with --model-path as {named!r}; leave one out")
    config = engine_config(**engine)
    architecture = _architecture(options.checkpoint if named is None else named, config.model.revision)
    model = model_of(options.device)
    plan = plan_on(config, architecture, model)
    context = min(CONTEXT, plan.context_length) if options.context is None else options.context
    if context > plan.context_length:
        raise ValueError(f"context is {context}; a request has at most {plan.context_length} tokens")
    report = Report(
        plan=plan,
        model=model,
        context=context,
        floors=decode_floors(plan, model, options.batch_sizes, context),
        prefill=prefill_floor(plan, model, context),
        remedies=remedies(plan, model),
    )
    if options.plot is not None:
        Path(options.plot).write_text(picture(plan, model, report.floors, context), encoding="utf-8")
    if options.json:
        print(json.dumps(report.as_object(), allow_nan=False))
    else:
        console = Console()
        report.show(console if console.is_terminal else Console(width=FILE_WIDTH))
    return 1 if plan.refusals else 0


def _architecture(checkpoint: str | None, revision: str | None) -> Architecture:
    """That of a folder, a Hugging Face id, a config.json, or the bundled checkpoint."""
    if checkpoint is not None and checkpoint.endswith(".json"):
        path = Path(checkpoint).expanduser()
        return architecture_of(read_json(path.parent, path.name))
    if checkpoint == "":
        raise ValueError("the model is ''; give a folder, a Hugging Face id or a config.json, or leave it out for the bundled checkpoint")
    folder = locate(str(tiny.path()) if checkpoint is None else checkpoint, revision=revision, weights=False)
    return architecture_of(read_json(folder, "config.json"))
