"""A real browser looks at a page: headless Chromium, one start a question."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MISSING = "no chromium: python -m tests.cluster install (Debian, as root)"
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-extensions", "--hide-scrollbars",
    "--enable-logging=stderr",
)  # fmt: skip
# Shows the page in frames of the widths that are asked for and writes down, as JSON, what became of it in each.
PROBE = """<!DOCTYPE html><meta charset="utf-8"><title>probe</title><body><script>
const facts = {}, widths = %s;
const shown = widths.map(width => new Promise(done => {
  const frame = document.createElement("iframe");
  frame.width = width; frame.height = 800; frame.src = %s;
  frame.onload = () => { facts[width] = look(frame.contentDocument, width); done(); };
  document.body.append(frame);
}));
function look(page, width) {
  const all = query => [...page.querySelectorAll(query)];
  const ids = all("[id]").map(one => one.id);
  const inner = one => { while ((one = one.parentElement)) if (one.matches(".scroll, svg")) return true; };
  return {
    scrolls: page.documentElement.scrollWidth,
    wide: all("body *").filter(one => one.getBoundingClientRect().right > width + 1 && !inner(one))
      .map(one => one.outerHTML.slice(0, 90)),
    ids: ids.filter((id, place) => ids.indexOf(id) !== place),
    active: all("script, img, iframe, object, embed, form, [onerror], [onload]").length,
    headings: all("h1, h2, h3, h4").map(one => [Number(one.tagName[1]), one.textContent]),
    charts: all("svg.chart").filter(one => one.getBoundingClientRect().width)
      .map(one => one.firstElementChild.textContent),
    pictures: all(".gallery image").map(one => one.getBoundingClientRect().width),
    text: page.body.innerText,
    untitled: all("svg[role=img]").filter(one => !one.querySelector("title")?.textContent).length,
    loose: all("th:not([scope])").length,
  };
}
Promise.all(shown).then(() => { document.body.innerHTML = ""; document.body.textContent = JSON.stringify(facts); });
</script>"""


def opened(page: Path, profile: Path) -> tuple[str, list[str]]:
    """The document that the browser makes of a page, and what it has to say on its console."""
    return _run(page.as_uri(), profile, "--dump-dom")


def probed(page: Path, profile: Path, *widths: int) -> dict[int, dict[str, Any]]:
    """What the page is at each width, see PROBE."""
    probe = page.with_name("probe.html")
    probe.write_text(PROBE % (json.dumps(widths), json.dumps(page.name)))
    made, console = _run(
        probe.as_uri(), profile, "--allow-file-access-from-files", "--virtual-time-budget=20000", "--dump-dom"
    )
    found = re.search(r"<body>(\{.*\})\s*</body>", made, re.DOTALL)
    assert found and not console, (made[-300:], console)
    text = found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&nbsp;", "\xa0").replace("&amp;", "&")
    return {int(width): facts for width, facts in json.loads(text).items()}


def _run(url: str, profile: Path, *flags: str) -> tuple[str, list[str]]:
    assert CHROMIUM, MISSING
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", *flags, url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
