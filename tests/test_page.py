"""The report page: what is in it, what it says of what is missing, and what a real browser makes of it."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import socket
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from evaluate import analysis, charts, page, page_time
from tests import browser, page_data
from tests.labeled_set import write_example
from utils import goodput, labels
from utils.coco_names import METRICS
from utils.errors import InputError
from utils.tree import Folder

HOSTILE = "<img src=http://127.0.0.1:{port}/x onerror=alert(1)>\"'&{{{{7*7}}}}</style><script>alert(2)</script>"
CLASSES = ("cat", "dog")
needs_browser = pytest.mark.skipif(not browser.CHROMIUM, reason=browser.MISSING)


def make_set(root: Path, classes: tuple[str, ...] = CLASSES, images: int = 10) -> labels.LabelIndex:
    """A labelled set of small images, of which training image 2 has a box that is no box."""
    for split, first in (("training", 1), ("validation", 30001)):
        for number in range(first, first + images):
            x, y = np.random.default_rng(number).integers(0, 20, 2).tolist()
            boxes = [[x, y, x + 22, y + 20], [x + 21, y + 2, x + 41.25, y + 26.5], [1, 1, 9, 9]]
            names = [classes[(number + place) % len(classes)] for place in range(3)]
            write_example(
                root / split, number, boxes if number != 2 else [[5, 5, 5, 9]], names if number != 2 else names[:1]
            )
    caches = {split: root.parent / "chain/labels" / f"{split}.index" for split in ("training", "validation")}
    return labels.load_splits(Folder(root), caches, classes=classes, on_error="skip")[1]


def make_chain(root: Path, last: str = "eval", classes: tuple[str, ...] = CLASSES, images: int = 10) -> Path:
    index = make_set(root / "set", classes, images)
    return page_data.make_chain(root / "chain", index, root / "set", last=last)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chain(tmp_path_factory.mktemp("kept"))


@pytest.fixture
def chain(kept: Path, tmp_path: Path) -> Path:
    """A chain of one's own to change; its data is that of `kept`."""
    return Path(shutil.copytree(kept, tmp_path / "chain"))


@pytest.fixture
def no_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take most of the time."""
    monkeypatch.setattr(charts, "_svg", lambda _, title, *__: charts.Markup(f"<svg><title>{title}</title></svg>"))


def text_of(chain: Path, reference: str | None = None) -> str:
    """The page's text, tags and what is no text left out."""
    written = page.write(chain, chain / "report.html", reference).read_text()
    body = re.sub(r"<style>.*?</style>|<svg.*?</svg>|<[^>]*>", " ", written[written.index("<body") :], flags=re.DOTALL)
    return " ".join(body.split())


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str, socket.socket]]:
    """A page of a chain whose files are full of markup that would ask this socket for something."""
    root = tmp_path_factory.mktemp("hostile")
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        text = HOSTILE.format(port=server.getsockname()[1])
        chain = make_chain(root, classes=(text[:95], "dog"))
        for stage in ("r2", "eval"):
            marker = json.loads((chain / stage / "state.json").read_text())
            config = marker["config"] | {"optim.lr": text, text: text}
            page_data.change(chain / stage / "state.json", config=config, metrics={"AP": text})
        page_data.change(chain / "r3/state.json", status="failed", cause=text, host=text, epochs=text)
        page_data.change(
            chain / "eval/metrics.json", versions={text: text}, exact=text, split=text, date=text, commit=text
        )
        for file in (chain / "r1/times").iterdir():
            page_data.change(file, device=text)
        yield page.write(chain, root / "report.html", "dl-sp22"), text, server


class Links(HTMLParser):
    """What a page refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = ("src", "href", "xlink:href", "action", "data", "poster", "srcset")
        self.found += [value or "" for name, value in attrs if name in names]


@needs_browser
def test_a_browser_opens_it_without_a_word_and_asks_nobody(
    hostile: tuple[Path, str, socket.socket], tmp_path: Path
) -> None:
    file, text, server = hostile
    made, console = browser.opened(file, tmp_path / "profile")
    assert console == []
    assert "</html>" in made and "<script" not in made
    facts = browser.probed(file, tmp_path / "profile", 360, 1100)
    server.setblocking(False)
    with pytest.raises(BlockingIOError):
        server.accept()
    for width, seen in facts.items():
        assert (seen["scrolls"], seen["wide"]) == (width, [])
        assert (seen["ids"], seen["active"], seen["untitled"], seen["loose"]) == ([], 0, 0, 0)
        levels = [level for level, _ in seen["headings"]]
        assert levels[0] == 1 and levels.count(1) == 1
        assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
        assert len(seen["charts"]) == 4  # of each pair, the one for this width
        assert len(seen["pictures"]) >= 8 and min(seen["pictures"]) > 250
        said = " ".join(seen["text"].split())
        assert said.count(" ".join(text.split())) >= 6  # cause, exact, versions, split, device, configuration
        assert " ".join(text[:95].split()) in said  # the class


def test_it_is_one_file_that_refers_to_nothing(hostile: tuple[Path, str, socket.socket]) -> None:
    written = hostile[0].read_text()
    links = Links()
    links.feed(written)
    assert len(links.found) > 20
    assert [link for link in links.found if not link.startswith(("#", "data:"))] == []
    assert all(link.startswith("#") for link in re.findall(r"url\(([^)]*)", written))
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert f'<meta http-equiv="Content-Security-Policy" content="{policy}">' in written
    assert len(written.encode()) < 5e6
    assert "@import" not in written and not re.search(
        r"#0[1-9a][01][0-9a][0-9a][1-9]\b", written
    )  # a chart's own colours


@pytest.mark.usefixtures("no_charts")
def test_the_numbers_are_those_of_the_files(chain: Path) -> None:
    said = text_of(chain, "dl-sp22")
    stats = json.loads((chain / "eval/metrics.json").read_text())["stats"]
    for name in METRICS:
        value = "n/a" if stats[name] == -1 else f"{stats[name]:.3f}"
        assert re.search(rf"\b{name} [^.]*?[a-z0-9² .:]* {re.escape(value)} ", said), name
    assert f" 0.237 {stats['AP'] - 0.237:+.3f} " in said and f" 0.398 {stats['AP50'] - 0.398:+.3f} " in said
    assert re.search(r"r1 ✓ done 9 h 18 min 1 restart 23 epochs in all", said)
    assert re.search(r"training 10 1 27 \d+ \d+ \d+ 1 validation 10 0 30", said)
    assert "1 images, labels or boxes were left out" in said and "training/labels/2.yml" in said
    assert "optim.lr 0.03 0.003 0.0003" in said
    assert f"git commit {page_data.COMMITS['']} (pretrain, r1, r2, eval); {page_data.COMMITS['r3']} (r3)" in said


@pytest.mark.usefixtures("no_charts")
def test_the_reference_can_be_another_run(chain: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    shutil.copy(chain / "eval/metrics.json", other)
    stats = json.loads(other.read_text())["stats"]
    page_data.change(other, stats=stats | {"AP": stats["AP"] + 0.3, "AP50": stats["AP50"] - 0.001})
    said = text_of(chain, str(other))
    assert "-0.300 ▼" in said and "+0.001 " in said and "+0.001 ▲" not in said
    assert "Whether it was measured on the same data is not known here" in said
    with pytest.raises(InputError, match=r"is a folder; name a file, such as .*/report\.html$"):
        page.write(chain, tmp_path)
    with pytest.raises(InputError, match="dl-sp22"):
        page.write(chain, tmp_path / "x.html", "unheard-of")


def test_the_parts_of_the_time_add_up(chain: Path) -> None:
    early = {"submitted": "2030-01-02T22:00:00+00:00"}  # while the parent of r1 still runs
    submitted = {"r1": early, "r2": early}
    (chain / "jobs.json").write_text(json.dumps(submitted))
    table = page_time.time(page.chain_files.read(chain))

    def seconds(cell: str) -> float:
        if not cell or cell.endswith(" s"):
            return float(cell.removesuffix(" s") or 0)
        hours, minutes, rest = map(int, cell.split(":"))
        return 3600 * hours + 60 * minutes + rest

    names = [stage["name"] for stage in table["stages"]]
    assert names == ["pretrain", "r1", "r2", "r3", "eval"]
    queued = 900  # after the parent's end; the time before that is the parent's
    for column, total in enumerate(table["sums"][:-1]):
        cells = [seconds(row["cells"][column]) for row in table["rows"]]
        assert sum(cells) == pytest.approx(seconds(total), abs=len(cells) / 2 + 0.5)
    assert seconds(table["sums"][1]) == pytest.approx(9.5 * 3600 + queued, abs=1)
    rows = {row["name"]: row["cells"][1] for row in table["rows"]}
    assert rows["redone"] == "0:10:20" and seconds(rows["queue"]) == queued
    (waited,) = (row["cells"][2] for row in table["rows"] if row["name"] == "queue")
    assert seconds(waited) == queued
    assert all(
        sum(float(part["width"][:-1]) for part in stage["parts"]) == pytest.approx(100, abs=0.01)
        for stage in table["stages"]
    )
    assert "raise workers from 2 to 7" in table["advice"][1]["text"]
    assert set(page_time.PARTS) == set(goodput.PARTS)


@pytest.mark.usefixtures("no_charts")
def test_what_an_old_chain_lacks_is_said(chain: Path) -> None:
    (chain / "eval/detections.npz").unlink()
    for stage in chain.glob("*/times"):
        shutil.rmtree(stage)
    said = text_of(chain)
    stats = json.loads((chain / "eval/metrics.json").read_text())["stats"]
    assert f"AP precision over recall, IoU .50 to .95 {stats['AP']:.3f}" in said and "95 % interval 0." not in said
    assert said.count("detections.npz is not there: this evaluation was made before detections were kept") == 4
    assert "No stage of this chain has recorded what its time went to" in said
    assert "AP of each class" in said and "cat" in said


@pytest.mark.usefixtures("no_charts")
def test_a_chain_that_still_runs(tmp_path: Path) -> None:
    chain = make_chain(tmp_path, last="r1")
    page_data.change(chain / "r1/state.json", status="running", ended=None, epochs=None)
    said = text_of(chain)
    assert "r1 ▸ running 1 restart epoch 22, step 9200" in said
    assert said.count("This chain has no evaluation yet.") == 5
    page_data.change(chain / "r1/state.json", status="failed", cause="the disk is full")
    assert "r1 failed: the disk is full" in text_of(chain)
    (chain / "jobs.json").write_text(json.dumps({"r2": {"submitted": "2030-01-02T22:00:00+00:00"}}))
    assert "r2 · todo" in text_of(chain)


@pytest.mark.usefixtures("no_charts")
def test_damaged_files_are_named(chain: Path) -> None:
    (chain / "pretrain/state.json").write_text("[]")
    (chain / "r1/state.json").write_text('{"status": ["done"], "inputs": 3}')
    with open(chain / "r2/metrics.jsonl", "a") as file:
        file.write('{"kind": "train"\n')
    (chain / "eval/metrics.json").write_text('{"stats": {"AP": "x"}}')
    (chain / "eval/detections.npz").write_bytes(b"PK")
    (chain / "jobs.json").write_text("{")
    said = text_of(chain)
    head = said[: said.index("The chain Result")]
    for name in ("pretrain/state.json", "r1/state.json", "r2/metrics.jsonl", "eval/metrics.json", "jobs.json"):
        assert f"{chain}/{name}" in head, name
    assert "detections.npz: damaged" in said
    assert "Result COCO" not in said


@pytest.mark.usefixtures("no_charts")
def test_half_a_surrogate_pair_is_shown_escaped(chain: Path) -> None:
    odd = "d\udcff"
    page_data.change(chain / "r3/state.json", status="failed", cause=f"no {odd}")
    metrics = json.loads((chain / "eval/metrics.json").read_text())
    per_class = {"cat": metrics["per_class"]["cat"], odd: metrics["per_class"]["dog"]}
    page_data.change(chain / "eval/metrics.json", classes=["cat", odd], per_class=per_class)
    arrays = dict(np.load(chain / "eval/detections.npz"))
    words = json.loads(arrays["words"].tobytes()) | {"classes": ["cat", odd]}
    arrays["words"] = np.frombuffer(json.dumps(words).encode(), dtype=np.uint8)
    np.savez(chain / "eval/detections.npz", **arrays)
    said = text_of(chain)
    assert "no d\\udcff" in said
    assert re.search(r"AP of each class .* d\\udcff \d+ 0\.\d", said)
    assert said.count("d\\udcff") >= 4  # in the confusion and the pictures too


@pytest.mark.usefixtures("no_charts")
def test_pictures_of_other_data_are_not_shown(chain: Path, tmp_path: Path) -> None:
    before = page.write(chain, tmp_path / "a.html").read_text()
    assert before.count("data:image/jpeg") >= 8
    marker = json.loads((chain / "eval/state.json").read_text())
    other = make_set(tmp_path / "other", images=9).tree
    for place, reason in ((other, "not the data that was evaluated"), (tmp_path / "gone", "not found")):
        page_data.change(chain / "eval/state.json", config=marker["config"] | {"data.labeled": str(place)})
        written = page.write(chain, tmp_path / "b.html").read_text()
        assert "data:image/jpeg" not in written and re.search(
            rf"cannot be read: \S*/{Path(str(place)).name}: .*{reason}|cannot be read: \S* is {reason}", written
        )


@pytest.mark.usefixtures("no_charts")
def test_many_classes(tmp_path: Path) -> None:
    classes = tuple(f"class {number}" for number in range(100))
    chain = make_chain(tmp_path, classes=classes, images=70)
    found = analysis.confusion(page.detections_file.load(chain / "eval/detections.npz"))
    np.fill_diagonal(found, 0)
    said = text_of(chain)
    between, background = re.findall(r"of that truth (.*?) (?:With background|The 20 greatest)", said)
    assert re.search(rf"\b{found[:-1, :-1].max()}\b", between) and "background" not in between
    assert re.search(rf"\b{max(found[-1].max(), found[:, -1].max())}\b", background)
    assert background.count("background") == min(20, np.count_nonzero(found[-1]) + np.count_nonzero(found[:, -1]))
    assert "the middle half of 72 classes, IoU .50 the middle 90 % of them " in said and "each of the" not in said
    written = (tmp_path / "chain/report.html").read_text()
    title = (
        "Precision over recall: means over 72 classes, and bands that hold the middle half and the middle 90 % of them"
    )
    assert written.count(f"<title>{title}</title>") == 2 and len(written.encode()) < 5e6


def drawn(classes: int) -> str:
    """Precision over recall of that many classes, which go down from 1 each at its own rate."""
    recall = np.linspace(0, 1, 101)
    curves = 1 - np.outer(np.linspace(0, 1, classes), recall)
    return charts.precision_recall("pr", "p", recall, curves.mean(axis=0)[None], curves)


def ends_of_band(chart: str, colour: str) -> float:
    """How far below its beginning, precision 1, the top of a band ends, as a share of how far the bottom does."""
    (path,) = re.findall(rf' d="([^"]*)"/>\s*</defs>\s*<g [^>]*>\s*<use [^>]*fill: var\({colour}\)', chart)
    points = [(float(x), float(y)) for x, y in re.findall(r"(-?[\d.]+) (-?[\d.]+)", path)]
    last = max(x for x, _ in points)
    below = [y - points[0][1] for x, y in points if x == last]
    return min(below) / max(below)


def test_of_many_classes_bands_are_drawn() -> None:
    few, many = drawn(charts.LINES), drawn(1203)
    assert few.count("stroke: var(--muted)") >= 2 * charts.LINES and "fill: var(--rule)" not in few
    assert many.count("stroke: var(--muted)") == 0 and len(many) < 100_000
    assert len(few) < 500_000
    for chart in many.split("</svg>")[:2]:
        assert chart.index("fill: var(--grid)") < chart.index("fill: var(--rule)") < chart.index("stroke: var(--c1)")
        assert ends_of_band(chart, "--grid") == pytest.approx(0.05 / 0.95, abs=0.005)
        assert ends_of_band(chart, "--rule") == pytest.approx(0.25 / 0.75, abs=0.005)


def test_no_chain(tmp_path: Path) -> None:
    for place in (tmp_path / "gone", tmp_path):
        with pytest.raises(InputError, match="give a chain's"):
            page.write(place, tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()


def test_a_chart_is_the_same_each_time() -> None:
    x = np.arange(1, 2001, dtype=float)
    rounds = [
        charts.Round(name, x + 2000 * k, {"loss": 1 / x, "lr": 0.1**k + 0 * x}) for k, name in enumerate(("a", "b"))
    ]
    first, second = (charts.training("t", "<title>", rounds) for _ in range(2))
    assert first == second
    assert "<title>&lt;title&gt;</title>" in first and "var(--c1)" in first
    assert len(first) < 200_000  # 4,000 records are averaged
