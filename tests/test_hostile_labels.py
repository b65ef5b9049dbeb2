"""Label files meant to do harm, or damaged so that they could: named before anything is trained, none runs or hangs."""

from __future__ import annotations

import json
import os
import pickle
import random
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
import yaml

from tests.labeled_set import write_set
from tests.ranks import run
from tests.test_detect_train import SMALL
from tests.test_labels import load
from utils import array_file, labels, typed_yaml
from utils.errors import InputError

BOX = "[1, 2, 30, 40]"
FIRST = 100  # the first case's image id: before it and after all cases are sound images
ALIASES = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
MERGES = "".join(f"a{n}: &a{n} {{!!merge <<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 12))


def one(box: str, name: str = "cat") -> str:
    return f"bboxes: [{box}]\nlabels: [{name}]\n"


# what is in the label file, where the problem is named to be, why
CASES: dict[str, tuple[str | bytes, str, str]] = {
    "NaN": (one("[.nan, 2, 30, 40]"), ": box 0", "is not finite"),
    "inf": (one("[1, 2, .inf, 40]"), ": box 0", "is not finite"),
    "-inf": (one("[-.inf, 2, 30, 40]"), ": box 0", "is not finite"),
    "1e30": (one("[1, 2, 1e30, 40]"), ": box 0", "is not finite"),
    "zero width": (one("[1, 2, 1, 40]"), ": box 0", "is empty or inverted"),
    "inverted": (one("[30, 40, 1, 2]"), ": box 0", "is empty or inverted"),
    "outside": (one("[50, 2, 90, 40]"), ": box 0", "is outside the image of 64x48"),
    "label -1": (one(BOX, "-1"), ": box 0", "unknown class -1"),
    "label 0": (one(BOX, "0"), ": box 0", "unknown class 0"),
    "label N+1": (one(BOX, "3"), ": box 0", "unknown class 3"),
    "label null": (one(BOX, "null"), ": box 0", "unknown class None"),
    "label in a list": (one(BOX, "[cat]"), ": box 0", "unknown class ['cat']"),
    "unknown name": (one(BOX, "unicorn"), ": box 0", "unknown class 'unicorn'"),
    "name of two lines": (one(BOX, '"cat\\n# end of report"'), ": box 0", r"unknown class 'cat\n# end of report'"),
    "long name": (one(BOX, "c" * 5000), ": box 0", "a name has 1 to 100 printable characters"),
    "more labels": (one(BOX, "cat, dog"), "", "1 bboxes but 2 labels"),
    "fewer labels": (one(f"{BOX}, {BOX}"), "", "2 bboxes but 1 labels"),
    "a box of nothing": (one("[]"), ": box 0", "expected 4 numbers, got []"),
    "a flat box": ("bboxes: [1, 2, 30, 40]\nlabels: [cat, cat, cat, cat]\n", ": box 0", "expected 4 numbers, got 1"),
    "empty file": (b"", "", "expected keys and values, got None"),
    "zeros": (bytes(500), ":1", "bad YAML: control characters are not allowed"),
    "words for numbers": (one("[no, 2, 30, 40]"), ": box 0", "expected 4 numbers, got ['no', 2, 30, 40]"),
    "a time for a number": (one("[1, 2, 12:30:00, 40]"), ": box 0", "expected 4 numbers, got [1, 2, '12:30:00', 40]"),
    "1e-3 is a number": (one("[1, 1e-3, 30, 1e+3]"), ": box 0", "[1, 0.001, 30, 1000.0] is outside the image"),
    "0123 is decimal": (one("[0123, 2, 30, 40]"), ": box 0", "[123, 2, 30, 40] is empty or inverted"),
    "aliases": (f"a0: &a0 [x]\n{ALIASES}{one(BOX, '*a11')}", ": box 0", "unknown class [[...], [...], [...], "),
    "aliases for lists": (f"a0: &a0 {BOX}\n{ALIASES}bboxes: *a11\nlabels: *a11\n", ": box 0", "expected 4 numbers"),
    "merges": (f"a0: &a0 {{x: 1}}\n{MERGES}{one(BOX)}", ":2:10", "bad YAML: could not determine a constructor"),
    "a list in itself": ("bboxes: &a [*a]\nlabels: &b [*b]\n", ": box 0", "expected 4 numbers"),
    "a call": ("bboxes: !!python/object/apply:os.system ['touch CANARY']\n", ":1:9", "bad YAML: could not determine"),
    "an object": ("bboxes: !!python/name:os.system\nlabels: []\n", ":1:9", "bad YAML: could not determine"),
    "not UTF-8": (b"bboxes: []\nlabels: [\xff\xfe]\n", ":2", "bad YAML: invalid leading UTF-8 octet"),
    "key twice": ("bboxes: []\nlabels: []\nlabels: [cat]\n", ":3:1", "bad YAML: key 'labels' stands twice"),
    "a key of lists": ("? [a]\n: b\n", ":1:3", "bad YAML: a key is a word or a number"),
    "deep": (f"bboxes: {'[' * 80000}{']' * 80000}", "", "bad YAML: nested more than 1000 deep"),
    "5000 digits": (one(f"[1, 2, {'9' * 5000}, 40]"), ":1:17", "bad YAML: Exceeds the limit"),
    "image_size of another": (f"{one(BOX)}image_size: [640, 480]\n", "", "image_size is [640, 480], but the image has"),
    "image_size of aliases": (f"a0: &a0 [x]\n{ALIASES}{one(BOX)}image_size: *a11\n", "", "image_size is [[...]"),
    "a million boxes": (one(", ".join([BOX] * 1_000_000)), "", "16000023 bytes; at most 4194304"),
    "a million aliases": (f"a: &a {BOX}\n{one(', '.join(['*a'] * 999_999))}", "", "999999 bboxes; at most 50000"),
}  # fmt: skip


def directory(file: Path) -> None:
    file.mkdir()


def fifo(file: Path) -> None:
    os.mkfifo(file)


def link_to_itself(file: Path) -> None:
    file.symlink_to(file.name)


def link_out(file: Path) -> None:
    outside = file.parents[3] / "outside.yml"
    outside.write_text(one(BOX))
    file.symlink_to(outside)


def huge(file: Path) -> None:
    with open(file, "wb") as hole:
        hole.truncate(1 << 40)


PLACES: dict[str, tuple[Callable[[Path], None], str]] = {
    "directory": (directory, "no label file of this id"),
    "FIFO": (fifo, "not a file, or a link to none"),
    "loop": (link_to_itself, "not a file, or a link to none"),
    "link out": (link_out, "outside.yml', outside the data"),
    "1 TB": (huge, "1099511627776 bytes; at most 4194304"),
    "missing": (lambda file: None, "no label file of this id"),
}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[str, str]]]:
    """A set with one image for every case, and the beginning of the line that names it."""
    root = write_set(tmp_path_factory.mktemp("hostile") / "data")
    training = root / "training"
    expected: dict[str, tuple[str, str]] = {}
    for number, (name, (content, where, reason)) in enumerate(CASES.items(), start=FIRST):
        (training / "images" / f"{number}.JPEG").write_bytes((training / "images" / "2.JPEG").read_bytes())
        raw = content.encode() if isinstance(content, str) else content
        (training / "labels" / f"{number}.yml").write_bytes(raw)
        expected[name] = f"training/labels/{number}.yml{where}: ", reason
    for number, (name, (make, reason)) in enumerate(PLACES.items(), start=FIRST + len(CASES)):
        (training / "images" / f"{number}.JPEG").write_bytes((training / "images" / "2.JPEG").read_bytes())
        make(training / "labels" / f"{number}.yml")
        file = f"images/{number}.JPEG" if name in ("missing", "directory") else f"labels/{number}.yml"
        expected[name] = f"training/{file}: ", reason
    for number, make in ((300, fifo), (301, directory), (302, huge)):
        (training / "labels" / f"{number}.yml").write_text(one(BOX))
        make(training / "images" / f"{number}.JPEG")
    expected["FIFO image"] = "training/images/300.JPEG: ", "not a file, or a link to none"
    expected["directory image"] = "training/labels/301.yml: ", "no image of this id"
    expected["huge image"] = "training/images/302.JPEG: ", "over the limit of 512 MiB for a file"
    (training / "labels" / "400.yml").write_text(one(BOX))
    expected["no image"] = "training/labels/400.yml: ", "no image of this id"
    os.close(os.open(os.fsencode(training / "labels") + b"/\xff\nERROR 0: fine.yml", os.O_CREAT))
    expected["file name"] = "training/'labels/\\udcff\\nERROR 0: fine.yml': ", "its name is not a number"
    (root / "classes.txt").write_text("cat\ndog\n")
    return root, expected


def train(data: Path, folder: Path, *words: str) -> CompletedProcess[str]:
    flags = ["--run-dir", folder / "run", "--dataset-root", data, "--epochs", "1", *SMALL, *words]
    return run([sys.executable, "-m", "detect_train.train", *flags], timeout=120)


def test_the_program_refuses_them_all_before_it_trains(
    hostile: tuple[Path, dict[str, tuple[str, str]]], tmp_path: Path
) -> None:
    data, expected = hostile
    before = sorted(os.listdir("."))
    done = train(data, tmp_path)
    assert done.returncode == 2, done.stderr[-2000:]
    more = 3 + 8  # boxes of the two cases with several
    assert f"ERROR 2: {data}: {len(expected) + more} unusable images, labels or boxes" in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr) < 20_000
    assert {path.name for path in tmp_path.iterdir()} == {"run", "labels"}
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {
        "config.yaml", "hyperparam.csv", "logs", "times", "lock.json", ".lock",
    }  # fmt: skip
    assert sorted(os.listdir(".")) == before and not list(data.rglob("CANARY"))


def test_every_one_is_named_with_its_place_and_reason(
    hostile: tuple[Path, dict[str, tuple[str, str]]], tmp_path: Path
) -> None:
    data, expected = hostile
    index = load(data, on_error="skip", cache=tmp_path / "cache.index")
    assert len({problem.partition(": ")[0] for problem in index.problems}) == len(expected)
    assert all(map(str.isprintable, index.problems))
    assert max(map(len, index.problems)) < 300
    for name, (where, reason) in expected.items():
        (problem,) = (problem for problem in index.problems if problem.startswith(where))
        assert reason in problem, (name, problem)


def test_skip_leaves_out_exactly_those(hostile: tuple[Path, dict[str, tuple[str, str]]], tmp_path: Path) -> None:
    data, _ = hostile
    index = load(data, on_error="skip", cache=tmp_path / "cache.index")
    sound = {path.stem for path in (data / "training" / "images").iterdir() if int(path.stem) < FIRST}
    negatives = {number for number, (_, where, _) in enumerate(CASES.values(), start=FIRST) if where == ": box 0"}
    assert set(index.ids.tolist()) == {int(stem) for stem in sound} | negatives
    assert len(index.boxes) == 2 * (len(sound) - 1)  # of the sound ones, of which one is empty
    assert index.classes == ("cat", "dog")


@pytest.mark.parametrize("name", ["inf", "label -1", "merges"])
def test_one_alone_ends_the_program_with_its_line(name: str, tmp_path: Path) -> None:
    content, where, reason = CASES[name]
    data = write_set(tmp_path / "data")
    (data / "training" / "labels" / "4.yml").write_text(str(content))
    done = train(data, tmp_path)
    assert done.returncode == 2, done.stderr[-2000:]
    assert f"\n  training/labels/4.yml{where}: " in done.stderr and reason in done.stderr
    assert not (tmp_path / "run" / "checkpoints").exists() and not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_set_without_boxes_of_any_form_has_negatives(tmp_path: Path) -> None:
    data = write_set(tmp_path)
    for number, text in ((2, "bboxes: []\nlabels: []"), (3, "bboxes: [\n]\nlabels: [ ]\nmore: 1")):
        (data / "training" / "labels" / f"{number}.yml").write_text(text)
    index = load(data)
    assert [index.target(i)[0].shape for i in range(4)] == [(0, 4), (0, 4), (0, 4), (2, 4)]


@pytest.mark.parametrize("name", ["a\x1b[2Jb", "x" * 101, "a\u202eb"])
def test_a_classes_file_with_names_that_cannot_be_printed_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text(f"cat\n{name}\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"classes .*: at most 100 printable characters"):
        labels.read_classes(tmp_path / "classes.txt")


def parsed(parse: Callable[[bytes, str], object], text: bytes) -> str:
    """The value with the types in it, or the error."""
    try:
        return repr(parse(text, "x.yml"))
    except InputError as error:
        return str(error)


TRICKY = [
    "null",
    "True",
    "~",
    "no",
    "e5",
    "cup or mug",
    "a-b",
    "a - b",
    "a: b",
    "it's",
    "1.5",
    "1e3",
    "0x1",
    ".inf",
    "",
]
SPOILERS = "\n\n\n  --:#[]{},&*!|>'\"%@`.+019e~?\t\r\\anNt_\xe9\x00\x85\ufeff"


def label_file(chosen: random.Random) -> bytes:
    """A label file as a dumper could have written it, most of them in the shape that is read fast."""
    count = chosen.choice([0, 1, 1, 2, 5])
    size = chosen.choice([1, 1e-7, 10.0**16, 99, 10**14, 10**16])
    boxes = [[round(chosen.uniform(-size, size), chosen.choice([0, 2, 17])) for _ in range(4)] for _ in range(count)]
    integers = [[int(value) for value in box] for box in boxes]
    names = chosen.choices(TRICKY if chosen.random() < 0.2 else ["cat", "cup or mug"], k=count)
    content = {"bboxes": chosen.choice([boxes, integers]), "labels": names, "image_size": [64, 48]}
    if chosen.random() < 0.1:
        content[chosen.choice(["null", "true", "x" * 2000, "more", "bboxes "])] = [1]
    style = chosen.choice([False, False, False, None, True])
    return yaml.safe_dump(content, default_flow_style=style, sort_keys=chosen.random() < 0.5).encode()


def careless(chosen: random.Random) -> bytes:
    """The same shape, written by somebody who quotes nothing."""
    keys = chosen.choices(["bboxes", "labels", "true", "null", "a_b", "x" * 2000], [5, 5, 1, 1, 1, 1], k=2)
    items = [
        *TRICKY,
        "- 1\n  - 2",
        "- 007\n  - -0",
        "1",
        "-2.50",
        "True false",
        "FALSE",
        "nulls",
        "y",
        "0123",
        "9" * 15,
    ]
    return "".join(f"{key}:\n" + "".join(f"- {item}\n" for item in [chosen.choice(items)] * 2) for key in keys).encode()


def test_the_fast_way_reads_what_the_slow_one_reads() -> None:
    chosen, fast, spoilt_fast = random.Random(0), 0, 0
    for _ in range(1000):
        text = chosen.choice([label_file, label_file, careless])(chosen)
        fast += typed_yaml._plain_lists(text) is not None
        assert parsed(typed_yaml.parse_lists, text) == parsed(typed_yaml.parse, text), text
        for _ in range(3):
            spoilt = bytearray(text)
            for _ in range(chosen.choice([1, 1, 1, 2])):
                at, length = chosen.randrange(len(spoilt) + 1), chosen.choice([0, 0, 1, 9])
                spoilt[at : at + length] = chosen.choice(SPOILERS).encode()
            if chosen.random() < 0.2:
                spoilt += text[chosen.randrange(len(text)) :]
            spoilt_fast += typed_yaml._plain_lists(bytes(spoilt)) is not None
            assert parsed(typed_yaml.parse_lists, bytes(spoilt)) == parsed(typed_yaml.parse, bytes(spoilt)), spoilt
    assert fast > 250 and spoilt_fast > 30, (fast, spoilt_fast)


@pytest.mark.parametrize("text", [content for content, _, _ in CASES.values()], ids=list(CASES))
def test_the_fast_way_leaves_harm_to_the_slow_one(text: str | bytes) -> None:
    raw = text.encode() if isinstance(text, str) else text
    value = typed_yaml._plain_lists(raw)
    assert value is None or repr(value) == repr(typed_yaml.parse(raw, ""))


def test_many_boxes_are_read_the_fast_way() -> None:
    rows = [[0.25, 1, 30.5, 40]] * 20_000
    text = yaml.dump({"bboxes": rows, "labels": ["cat"] * 20_000}, Dumper=NoAliases).encode()
    assert typed_yaml._plain_lists(text) == {"bboxes": rows, "labels": ["cat"] * 20_000}


class NoAliases(yaml.CSafeDumper):
    def ignore_aliases(self, data: object) -> bool:
        return True


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.canary,)


def rewrite(cache: Path, change: Callable[[bytes], bytes]) -> None:
    """Change what a cache holds, and correct its checksum."""
    content = change(cache.read_bytes()[array_file.CRC :])
    cache.write_bytes(b"%08x\n" % zlib.crc32(content) + content)


def with_objects(cache: Path, canary: Path) -> None:
    """The cache with an array of objects, which are addresses in memory, in place of its boxes."""
    rewrite(cache, lambda content: content.replace(b'["boxes", "<f8"', b'["boxes", "|O8"'))


def too_long(cache: Path, canary: Path) -> None:
    rewrite(cache, lambda content: content.replace(b'["boxes", "<f8", [1', b'["boxes", "<f8", [9'))


def without_a_name(cache: Path, canary: Path) -> None:
    rewrite(cache, lambda content: content.replace(b'"arrays"', b'"arroys"'))


def all_pickle(cache: Path, canary: Path) -> None:
    cache.write_bytes(pickle.dumps(Payload(canary)))


def wrong_boxes(cache: Path) -> None:
    """A whole cache, of these files, with other boxes."""
    key = json.loads(cache.read_bytes()[array_file.CRC :].partition(b"\n")[0])["key"]
    saved = array_file.load(cache, key)
    assert saved
    words = {name: saved.pop(name) for name in labels.WORDS}
    array_file.save(cache, key, words, {**saved, "boxes": saved["boxes"] + 1})


def moved(cache: Path, canary: Path) -> None:
    """Somebody else's file, reached by a link."""
    cache.rename(cache.with_name("theirs.index"))
    cache.symlink_to("theirs.index")


def writable(cache: Path, canary: Path) -> None:
    cache.chmod(0o666)


def waiting(cache: Path, canary: Path) -> None:
    cache.unlink()
    os.mkfifo(cache)


@pytest.mark.parametrize("harm", [with_objects, too_long, without_a_name, all_pickle, moved, writable, waiting])
def test_a_cache_that_could_be_somebody_else_s_is_made_again(
    harm: Callable[[Path, Path], None], tmp_path: Path
) -> None:
    data, cache, canary = write_set(tmp_path / "data"), tmp_path / "cache.index", tmp_path / "canary"
    first = load(data, cache=cache)
    before = cache.read_bytes()
    if harm in (moved, writable):
        wrong_boxes(cache)
        assert load(data, cache=cache).boxes.tolist() == (first.boxes + 1).tolist()
    harm(cache, canary)
    assert harm is waiting or cache.read_bytes() != before
    again = load(data, cache=cache)
    assert np.array_equal(again.boxes, first.boxes)
    assert not canary.exists()
    assert cache.is_file() and not cache.is_symlink() and not cache.stat().st_mode & 0o022


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file away")
def test_another_user_s_cache_is_made_again(tmp_path: Path) -> None:
    data, cache = write_set(tmp_path / "data"), tmp_path / "cache.index"
    first = load(data, cache=cache)
    wrong_boxes(cache)
    cache.chmod(0o600)
    os.chown(cache, 12345, 12345)
    assert np.array_equal(load(data, cache=cache).boxes, first.boxes)
    assert cache.stat().st_uid == os.getuid()


def test_a_cache_with_a_flipped_bit_is_right_or_made_again(tmp_path: Path) -> None:
    data, cache = write_set(tmp_path / "data"), tmp_path / "cache.index"
    first = load(data, cache=cache)
    whole = cache.read_bytes()
    chosen = random.Random(0)
    for _ in range(250):
        damaged = bytearray(whole)
        damaged[chosen.randrange(len(whole))] ^= 1 << chosen.randrange(8)
        cache.write_bytes(damaged)
        again = load(data, cache=cache)
        assert json.dumps([again.ids.tolist(), again.boxes.tolist(), again.classes]) == json.dumps(
            [first.ids.tolist(), first.boxes.tolist(), first.classes]
        )
