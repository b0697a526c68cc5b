"""The page in a real browser: nothing sticks out at any width, letters are large enough, dark is dark, it prints."""

import html
import json
import re
import shutil
import subprocess

import pytest
from PIL import Image
from report.documents import HOSTILE, absent, document, evidence, falling, file, seen
from report.test_page import CHECKS, everywhere, whole

from edgekit.report import page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed: apt-get install chromium")

DESKTOP, TABLET, PHONE = 1280, 760, 390

# Runs in the page around the reports, which hold no script: what they are is read from outside.
MEASURE = """
<script>
onload = () => {
  const found = [...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument, width = frame.clientWidth, view = frame.contentWindow;
    const inside = element => element.closest(".scroll") || element.closest(".hidden") || element.closest("thead");
    const out = [...page.body.querySelectorAll("*")].filter(element => !inside(element)
      && element.getBoundingClientRect().right > width + 1);
    const letters = [...page.querySelectorAll("p, td, th, small, li, dd, dt, span, code, svg text")]
      .filter(element => element.textContent.trim() && element.getClientRects().length);
    const size = element => parseFloat(view.getComputedStyle(element).fontSize)
      * (element.ownerSVGElement ? element.getScreenCTM().a : 1);
    return {wanted: page.documentElement.scrollWidth, width, height: page.documentElement.scrollHeight,
            out: out.map(element => `${element.tagName}.${element.className} ${element.textContent.slice(0, 40)}`),
            smallest: Math.min(...letters.map(size)),
            scrolls: [...page.querySelectorAll(".scroll")].filter(box => box.scrollWidth > box.clientWidth).length,
            pictures: [...page.images].filter(image => image.naturalWidth).length,
            grounds: view.getComputedStyle(page.body).backgroundColor};
  });
  document.title = JSON.stringify(found);
};
</script>
"""


def chromium(*arguments, timeout=120):
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr
    return done.stdout


def measured(folder, pages, widths, *arguments):
    """What every page is at every width, (width, page) in the order of the arguments."""
    style = "border:0;height:800px;display:block"
    frames = [
        f'<iframe style="width:{width}px;{style}" srcdoc="{html.escape(one)}"></iframe>'
        for width in widths
        for one in pages
    ]
    around = folder / "around.html"
    around.write_text(f"<!DOCTYPE html><meta charset=utf-8>{''.join(frames)}{MEASURE}", encoding="utf-8")
    dumped = chromium("--dump-dom", *arguments, around.as_uri())
    title = re.search("<title>(.*?)</title>", dumped, re.S)
    assert title, dumped[:500]
    return json.loads(html.unescape(title.group(1)))


def many():
    """More files than a page is wide."""
    names = [f"onnx-int8-variant-{place}" for place in range(8)]
    verdict = document(*(file(460, name, checks=CHECKS) for name in names), absent())
    return page.to_html(verdict, evidence(*(seen(name, 460, pictures=3, curves=falling(0.6)) for name in names)))


def test_nothing_sticks_out_and_all_can_be_read_at_desktop_and_phone_widths(tmp_path):
    pages = [page.to_html(*whole(), command="edgekit verify " + "x" * 300), page.to_html(document(file())), many()]
    found = measured(tmp_path, pages, (DESKTOP, PHONE, 320, TABLET, 641))
    assert [one["width"] for one in found] == [DESKTOP] * 3 + [PHONE] * 3 + [320] * 3 + [TABLET] * 3 + [641] * 3
    for one in found:
        assert one["out"] == []
        assert one["wanted"] <= one["width"]
        assert one["smallest"] >= 9.5
    assert [one["scrolls"] for one in found[:9]] == [0, 0, 2] + 6 * [0]  # a table that scrolls: only where it must
    assert [one["pictures"] for one in found[:3]] == [3 * 13, 0, 3 * 3 * 8]


def test_no_name_makes_the_page_wider(tmp_path):
    pages = [everywhere(HOSTILE[kind]) for kind in ("long", "markup", "direction", "ticks")]
    for one in measured(tmp_path, pages, (DESKTOP, TABLET, PHONE)):
        assert one["out"] == []
        assert one["wanted"] <= one["width"]


@pytest.mark.parametrize(("scheme", "ground"), [(0, (14, 19, 24)), (1, (244, 246, 248))])
def test_it_opens_from_disk_in_dark_and_in_light(tmp_path, scheme, ground):
    report = tmp_path / "report.html"
    page.write(*whole(), report)
    picture = tmp_path / "shot.png"
    chromium(
        f"--screenshot={picture}", "--window-size=1280,900", f"--blink-settings=preferredColorScheme={scheme}",
        report.as_uri(),
    )  # fmt: skip
    shot = Image.open(picture).convert("RGB")
    assert shot.size == (1280, 900)
    assert shot.getpixel((4, 4)) == ground
    assert len(shot.getcolors(maxcolors=1 << 20) or []) > 50


def test_it_prints(tmp_path):
    report, printed = tmp_path / "report.html", tmp_path / "report.pdf"
    page.write(*whole(), report)
    chromium(f"--print-to-pdf={printed}", "--no-pdf-header-footer", report.as_uri())
    assert printed.read_bytes().startswith(b"%PDF-")
