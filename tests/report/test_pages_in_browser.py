"""Pages of a report as Chromium shows them: what a reader sees, points at and walks through."""

import re

import pytest
from chromium import BROWSER, DRIVER, Chromium
from pages import scored, trained
from scored import made

from geomkd.measures import KnowledgeQuality
from geomkd.report import page

pytestmark = pytest.mark.browser
LEAST = 4.5  # contrast of text, WCAG 2.2 AA

# Every text that is seen, its colour, and that of what it lies on: of the first ancestor with one.
COLOURS = """
const seen = [];
for (const element of document.querySelectorAll("body *")) {
  const texts = [...element.childNodes].filter((node) => node.nodeType === 3);
  const style = getComputedStyle(element);
  if (!texts.some((node) => node.textContent.trim()) || !element.getClientRects().length) continue;
  if (element.closest("script, .aside, #tip")) continue;
  let under = element;
  while (under && getComputedStyle(under).backgroundColor === "rgba(0, 0, 0, 0)") {
    under = under.parentElement;
  }
  const colour = element.closest("svg") ? style.fill : style.color;
  const paper = under ? getComputedStyle(under).backgroundColor : "none";
  seen.push([colour, paper, element.tagName, element.textContent.trim().slice(0, 30)]);
}
return seen;
"""
STROKES = """
return [...document.querySelectorAll("svg path")].map((path) => getComputedStyle(path))
  .filter((style) => style.stroke !== "none" && style.fill === "none").map((style) => style.stroke);
"""


@pytest.fixture(scope="module")
def chromium():
    """One browser for all tests."""
    if BROWSER is None or DRIVER is None:
        pytest.skip("there is no Chromium with its driver here (chromium, chromium-driver)")
    driver = Chromium()
    yield driver
    driver.end()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Files: several networks with long names, one of few layers; a distillation."""
    folder = tmp_path_factory.mktemp("pages")
    long = [f"base_model.encoder.layers.encoder_layer_{i}.self_attention" for i in range(32)]
    measures = ("knowledge_quality", "two_nn", "neural_collapse", "logme")
    several = {
        "a teacher": scored(long, measures, samples_per_class=[9, 9]),
        "a student": trained(),
    }
    few = scored(["stem", "block", "top"], null=20)
    few.frame["quality_p_value"] = [0.05, 1e-7, 0.2]
    return {
        "several": page(several, folder / "several.html", notes=["3 rows are zero"]),
        "few": few.to_html(folder / "few.html"),
    }


@pytest.fixture
def show(chromium, pages):
    """Open a page in a window of a width, light or dark, on paper or on a screen."""

    def show(name, width=1000, scheme="light", media=""):
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
        chromium.tell("Emulation.setDeviceMetricsOverride", **size)
        feature = {"name": "prefers-color-scheme", "value": scheme}
        chromium.tell("Emulation.setEmulatedMedia", media=media, features=[feature])
        chromium.open(pages[name].as_uri() if name in pages else name)
        return chromium

    return show


def rgb(colour):
    return [float(part) for part in re.findall(r"[\d.]+", colour)][:3]


def contrast(one, other):
    """Ratio of relative luminances, as WCAG 2 defines both."""

    def luminance(colour):
        shares = [part / 255 for part in rgb(colour)]
        linear = [s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_that_of_the_standard():
    assert contrast("rgb(0, 0, 0)", "rgb(255, 255, 255)") == pytest.approx(21)
    assert contrast("rgb(119, 119, 119)", "rgb(255, 255, 255)") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("name", ["several", "few"])
def test_nothing_is_fetched_and_nothing_goes_wrong(show, pages, name):
    driver = show(name)
    sent = driver.log("performance")
    asked = {
        url
        for message in sent
        if "requestWillBeSent" in message
        for url in re.findall(r'"url":"([^"]+)"', message)
    }
    assert pages[name].as_uri() in asked
    assert [url for url in asked if not url.startswith(("data:", "file:", "about:"))] == []
    assert driver.run("return performance.getEntriesByType('resource').length") == 0
    assert driver.log("browser") == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(show, scheme):
    driver = show("several", scheme=scheme)
    seen = driver.run(COLOURS)
    assert {"H1", "TD", "TH", "LI", "FIGCAPTION", "DT", "BUTTON", "text"} <= {s[2] for s in seen}
    assert [s for s in seen if contrast(s[0], s[1]) < LEAST] == []
    paper = driver.run("return getComputedStyle(document.body).backgroundColor")
    assert (sum(rgb(paper)) < 150) == (scheme == "dark")
    strokes = set(driver.run(STROKES))
    weak = {s for s in strokes if contrast(s, paper) < 3}
    assert len(strokes) >= 6 and len(weak) <= 1  # the grid


def test_on_paper_it_is_light(show):
    driver = show("few", scheme="dark", media="print")
    body = "const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]"
    ink, paper = driver.run(body)
    assert sum(rgb(ink)) < 150 and sum(rgb(paper)) == 765


@pytest.mark.parametrize("name", ["several", "few"])
def test_a_phone_scrolls_tables_and_pictures_but_not_the_page(show, name):
    driver = show(name, width=360)
    width = "return document.documentElement.scrollWidth"
    assert driver.run(width) == 360
    regions = driver.run(
        "return [...document.querySelectorAll('.scroll')]"
        ".map((e) => [e.scrollWidth > e.clientWidth, e.tabIndex, e.ariaLabel, e.clientWidth])"
    )
    assert any(wide for wide, *_ in regions)
    assert all(stop == 0 and label and own <= 360 for _, stop, label, own in regions)
    sizes = driver.run(
        "return [...document.querySelectorAll('svg text')]"
        ".map((e) => e.getScreenCTM().a ** 2 + e.getScreenCTM().b ** 2)"
        ".map((s, i) => Math.sqrt(s) * parseFloat(getComputedStyle("
        "document.querySelectorAll('svg text')[i]).fontSize))"
    )
    assert min(sizes) > 7.5  # CSS pixels


def column(driver, number, table=0):
    return driver.run(
        "const table = document.querySelectorAll('table')[arguments[0]];"
        "return [...table.tBodies[0].rows].map((row) => row.cells[arguments[1]].textContent)",
        table,
        number,
    )


def test_tables_sort_by_click_and_by_keyboard(show):
    driver = show("few")
    button = "return document.querySelectorAll('table')[arguments[0]].tHead.rows[0].cells[0]"
    first = driver.run(f"{button}.querySelector('button')", 1)
    head = f"{button}.getAttribute('aria-sort')"
    assert column(driver, 0, 1) == ["stem", "block", "top"]
    driver.point(first, click=True)
    assert column(driver, 0, 1) == ["block", "stem", "top"]
    assert driver.run(head, 1) == "ascending"
    driver.press("ENTER")
    assert column(driver, 0, 1) == ["top", "stem", "block"]
    assert driver.run(head, 1) == "descending"
    said = driver.run("return document.querySelector('[role=status]').textContent")
    assert said == "Sorted by layer, falling"
    driver.press("TAB", "TAB", "SPACE")  # depth
    assert column(driver, 2, 1) == ["0", "1", "2"]
    assert driver.run(head, 1) is None


def test_numbers_sort_as_numbers_and_what_is_missing_comes_last(show):
    driver = show("few")
    place = next(i for i in range(9) if column(driver, 1, i) == ["0.05", "1e-07", "0.2"])
    head = "document.querySelectorAll('table')[arguments[0]].tHead.rows[0].cells[1]"
    press = f"{head}.querySelector('button').click()"
    driver.run(press, place)
    assert column(driver, 1, place) == ["1e-07", "0.05", "0.2"]
    cell = "document.querySelectorAll('table')[arguments[0]].tBodies[0].rows[1].cells[1]"
    driver.run(f"{cell}.textContent = '–'; {press}", place)
    assert column(driver, 1, place) == ["0.2", "1e-07", "–"]


def test_points_tell_their_value_on_focus_and_under_the_pointer(show):
    driver = show("few")
    tip = "const tip = document.getElementById('tip'); return tip.hidden ? null : tip.textContent"
    focused = "return document.activeElement.ariaLabel"
    driver.run("document.querySelector('.scroll').focus()")
    driver.press("TAB")
    told = driver.run(tip)
    assert told.startswith("stem: separation (S) ") and told == driver.run(focused)
    assert re.search(r"spread [\d.]+ to [\d.]+$", told)
    driver.press("ARROW_RIGHT")
    assert driver.run(tip).startswith("block: separation (S) ")
    driver.press("END")
    assert driver.run(tip).startswith("top: separation (S) ")
    driver.press("TAB")  # one stop a curve
    assert driver.run(tip).startswith("stem: information (I) ")
    driver.press("ESCAPE")
    assert driver.run(tip) is None
    point = driver.run(
        "const p = document.querySelectorAll('.curve')[2].querySelectorAll('.point')[2];"
        "p.scrollIntoView({block: 'center'}); return p"
    )
    driver.point(point)
    assert driver.run(tip).startswith("top: efficiency (E) ")
    box = (
        "const b = document.getElementById('tip').getBoundingClientRect(); return [b.left, b.right]"
    )
    left, right = driver.run(box)
    assert left >= 0 and right <= 1000


def test_what_can_be_reached_has_a_name(show):
    driver = show("several")
    driver.tell("Accessibility.enable")
    nodes = driver.tell("Accessibility.getFullAXTree")["nodes"]
    driver.tell("Accessibility.disable")
    found = {}
    for node in nodes:
        focusable = any(p["name"] == "focusable" for p in node.get("properties", []))
        role = node["role"]["value"]
        told = focusable or role in ("image", "region", "group", "button", "heading", "table")
        if told and not node["ignored"] and role != "RootWebArea":
            found.setdefault(role, []).append(node.get("name", {}).get("value", ""))
    assert {"image", "button", "region", "heading"} <= set(found)
    nameless = {role: names.count("") for role, names in found.items() if "" in names}
    assert set(nameless) <= {"table", "group"}  # named by the region, or figure, around them
    roles = [node["role"]["value"] for node in nodes if not node["ignored"]]
    assert roles.count("columnheader") > 20 and roles.count("rowheader") > 60


@pytest.mark.parametrize("scheme", [("#111111", "#eeeeee"), ("#ffffff", "#111111")])
def test_what_jupyter_shows_takes_the_colours_around_it(show, tmp_path, scheme):
    q = KnowledgeQuality(1.5, 0.5, 0.25, 4.0, {"mean_norm": 3.0}, "robust", 120, 24, 4)
    shown = "".join(thing._repr_html_() for thing in (q, made(), trained()))
    paper, ink = scheme
    style = f"background:{paper};color:{ink}"
    (tmp_path / "cell.html").write_text(
        f'<!DOCTYPE html><meta charset="utf-8"><body style="{style}">{shown}', "utf-8"
    )
    seen = show((tmp_path / "cell.html").as_uri()).run(COLOURS)
    assert {"CAPTION", "TD", "TH", "CODE", "LI"} <= {s[2] for s in seen} and len(seen) > 60
    assert [s for s in seen if contrast(s[0], s[1]) < 12] == []
