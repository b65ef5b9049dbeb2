"""The report of a chain as one page: self-contained, without a script, opened from a file or sent as one.

    python -m evaluate.report runs/mocov2_fpn -o report.html --reference dl-sp22

What a chain lacks, an old one or one that still runs, is said in its place; nothing is made up. Every text of a run's
files is escaped by the templates, and the page's content security policy lets nothing be loaded.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from evaluate import (
    analysis,
    chain_files,
    detections_file,
    gallery,
    page_errors,
    page_results,
    page_run,
    page_time,
    page_training,
    references,
)
from evaluate.chain_files import ChainFiles, StageFiles, is_number
from evaluate.detections_file import Evaluated
from evaluate.page_results import Evaluation
from utils import attempts
from utils.coco_names import show
from utils.errors import InputError
from utils.files import write_atomic

TEMPLATES = Path(__file__).parent / "templates"
SECTIONS = (
    ("stages", "The chain"),
    ("results", "Result"),
    ("training", "Training"),
    ("classes", "Classes"),
    ("errors", "Errors"),
    ("gallery", "Images"),
    ("data", "Data"),
    ("time", "Where the time went"),
    ("configuration", "Configuration"),
)


def write(chain_dir: Path, out: Path, reference: str | None = None) -> Path:
    """Write the page of a chain's directory to `out`, and return that.

    Args:
        reference: what the result is compared with: a name in references.yaml, or the metrics.json of a run.

    Raises: InputError when `chain_dir` has no stage, or the reference is unknown; OSError when `out` cannot be written.
    """
    if out.is_dir():
        raise InputError(f"{out}: is a folder; name a file, such as {out / 'report.html'}")
    chain = chain_files.read(chain_dir)
    compared = references.load(reference) if reference else {}
    found, why = _evaluated(chain)
    evaluation = Evaluation.read(chain, found, why)
    status = chain_files.status(chain, chain.evaluation) if chain.evaluation else ""
    results = page_results.results(evaluation, status, reference, compared)
    content = {
        "sections": SECTIONS,
        "style": Markup((TEMPLATES / "style.css").read_text()),
        "head": _head(chain, evaluation, results["rows"]),
        "stages": [_stage(chain, stage) for stage in chain.stages],
        "training": [page_training.line(number, stages) for number, stages in enumerate(chain.lines)],
        "results": results,
        "classes": page_results.classes(evaluation),
        "curves": page_results.curves(evaluation),
        "confusion": page_errors.confusion(evaluation),
        "kinds": page_errors.kinds(evaluation),
        "gallery": gallery.pictures(chain, found, why),
        "data": page_run.data(chain, evaluation.metrics, found),
        "time": page_time.time(chain),
        "configuration": page_run.configuration(chain, evaluation.metrics),
    }
    loader = jinja2.FileSystemLoader(TEMPLATES)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    text = environment.get_template("report.html.j2").render(content).lstrip()
    # JSON can hold half a surrogate pair, which UTF-8 cannot: it is shown as its escape
    write_atomic(out, lambda file: file.write(text.encode(errors="backslashreplace")))
    return out


def _evaluated(chain: ChainFiles) -> tuple[Evaluated | None, str]:
    """The chain's detections, or why there are none."""
    stage = chain.evaluation
    if stage is None:
        return None, "This chain has no evaluation yet."
    if not stage.run_dir.report_json.exists():
        return None, f"The evaluation ({stage.name}) is {chain_files.status(chain, stage)}: it has no result yet."
    if not stage.run_dir.detections.exists():
        return None, (
            f"{stage.run_dir.detections} is not there: this evaluation was made before detections were kept. "
            "Evaluate again to see this."
        )
    try:
        found = detections_file.load(stage.run_dir.detections)
        analysis.evaluator(found)  # or why it cannot be analysed here
        return found, ""
    except InputError as error:
        return None, f"{error}."


def _head(chain: ChainFiles, evaluation: Evaluation, rows: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    states = [chain_files.status(chain, stage) for stage in chain.stages]
    about = f"{len(chain.stages)} stages, {states.count('done')} of them done"
    metrics = evaluation.metrics
    if metrics:
        about += (
            f"; evaluated on {metrics['images']:,} images of {len(metrics['classes'])} classes"
            f" ({metrics['split']} split of {page_run.last_part(metrics['data'])})"
        )
    by_name = {row["name"]: row for row in rows}
    numbers = []
    for name in ("AP", "AP50", "AP75") if rows else ():
        row = by_name[name]
        note = f"95 % interval {row['interval']}" if row["has_interval"] else ""
        numbers.append({"name": name, "value": row["value"], "note": note})
    if metrics:
        numbers.append({"name": "epochs trained", "value": metrics["epoch"] + 1, "note": ""})
    return {
        "name": chain.name,
        "path": chain.path,
        "date": datetime.datetime.now().astimezone().strftime("%-d %B %Y, %H:%M %Z"),
        "sentence": f"{' → '.join(stage.name for stage in chain.stages)}: {about}.",
        "numbers": numbers,
        "problems": [*chain.problems, *evaluation.problems],
    }


def _stage(chain: ChainFiles, stage: StageFiles) -> dict[str, Any]:
    """One box of the strip."""
    status, marker = chain_files.status(chain, stage), stage.marker
    lines = []
    if stage.seconds is not None:
        began = chain_files.seconds(marker["started"]) or 0.0
        lines.append(page_time.duration(stage.seconds + attempts.ran_before(stage.run_dir, began)))
    if restarts := attempts.restarts(stage.run_dir, marker):
        lines.append(f"{restarts} restart{'s' if restarts != 1 else ''}")
    if marker.get("epochs") is not None and stage.of_kind("train"):
        lines.append(f"{marker['epochs']} epochs in all")
    elif stage.records and status != "done":
        lines.append(f"epoch {stage.records[-1]['epoch']}, step {stage.records[-1]['step']}")
    reached = marker.get("metrics")
    if isinstance(reached, dict):
        known = [(name, reached[name]) for name in ("AP", "loss_avg", "recall") if is_number(reached.get(name))]
        lines += [f"{name.removesuffix('_avg')} {show(value)}" for name, value in known[:1]]
    icons = {"done": "✓", "failed": "✕", "running": "▸", "preempted": "‖", "stale": "!"}
    return {
        "name": stage.name,
        "kind": status if status in icons else "todo",
        "state": f"{icons.get(status, '·')} {status}",
        "status": status,
        "lines": lines,
        "cause": marker.get("cause") if status != "done" else None,
    }
