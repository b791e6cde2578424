"""The pages in a browser: every control used, nothing fetched, no error, no script of a name run."""

from __future__ import annotations

import json
import shutil

import pytest

from experiments.domain_neurons.report import page as report
from mllm_jax.report import style
from tests.helpers import fake_study

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium"),
]
HOSTILE = "<img src=x onerror=alert(1)>"
DOMAINS = ["objects", HOSTILE, "</script><b>", "documents", "$x$ & %{x}"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The pages of a study with hostile names."""
    folder = tmp_path_factory.mktemp("study")
    results = json.loads(json.dumps(fake_study.fake_results(domains=DOMAINS, grids=(7, 4))))
    fake_study.write_pictures(folder, results)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(style.STYLE, "savefig.dpi", 40)  # quicker
        report.write(folder, results)
    return folder


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as run:
        chromium = run.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(params=[1400, 390])
def visit(request, browser, folder):
    """Opens a page of the study at a width; afterwards nothing may have gone wrong."""
    tab, wrong = browser.new_page(viewport={"width": request.param, "height": 900}), []
    tab.on("console", lambda message: wrong.append(message.text))
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
    tab.on("requestfailed", lambda request: wrong.append(request.url))
    tab.on(
        "request", lambda r: r.url.startswith(("file:", "data:", "blob:")) or wrong.append(r.url)
    )

    def visit(name):
        tab.goto((folder / name).as_uri())
        return tab

    yield visit
    assert tab.evaluate("document.documentElement.scrollWidth") <= request.param
    assert not tab.locator("img[src=x]").count() and not wrong
    tab.close()


def test_charts_are_drawn_and_tell_their_values(visit):
    tab = visit("index.html")
    for panel in tab.locator(".panel").all():
        panel.scroll_into_view_if_needed()
        panel.locator(".main-svg").first.wait_for()
    assert tab.locator(".js-plotly-plot").count() == tab.locator(".panel").count() > 15
    assert tab.locator(".drawn > .image").first.is_hidden()
    plot = tab.locator(".panel").first
    plot.scroll_into_view_if_needed()
    plot.locator(".points path").first.hover(force=True)
    plot.locator(".hoverlayer text").first.wait_for()
    assert "n = 240" in plot.locator(".hoverlayer").text_content()
    before = plot.locator(".xtick text").all_text_contents()
    plot.hover()
    plot.locator("[data-attr=zoom][data-val=in]").click()
    tab.wait_for_function(
        "([plot, text]) => plot.querySelector('.xaxislayer-above').textContent !== text",
        arg=[plot.element_handle(), "".join(before)],
    )
    assert HOSTILE in plot.locator(".ytick").all_text_contents()


def test_a_click_on_the_matrix_shows_the_changed_answers(visit):
    tab = visit("index.html")
    panel = tab.get_by_role("group", name="change of accuracy").first
    panel.scroll_into_view_if_needed()
    panel.locator(".heatmaplayer image, .heatmaplayer path").first.wait_for(state="attached")
    assert tab.locator("details[open]").count() == 0
    panel.locator(".nsewdrag").click(position={"x": 4, "y": 4})
    cell = tab.locator("details[open] details[open]")
    cell.wait_for()
    assert cell.get_attribute("id").endswith("-0-0")
    told = cell.inner_text()
    assert "a ball" in told and "a <cat> & $x$" in told and "n = 240" in told
    summary = tab.locator("details.answers details summary").nth(1)
    summary.focus()
    tab.keyboard.press("Enter")  # the same without a mouse
    assert tab.locator("details[open] details[open]").count() == 2


def test_neurons_are_sorted_filtered_and_opened(visit):
    tab = visit("index.html")
    table = tab.locator("table.sortable")
    column = table.locator("tbody tr:visible td:nth-child(3)")
    assert column.all_inner_texts() == ["3", "2", "5"]
    head = table.locator("th button", has_text="layer")
    head.click()
    assert column.all_inner_texts() == ["5", "3", "2"]
    head.press("Enter")
    assert column.all_inner_texts() == ["2", "3", "5"]
    assert head.locator("..").get_attribute("aria-sort") == "ascending"
    tab.locator("input[type=search]").fill("language 5")
    assert column.all_inner_texts() == ["5"]
    assert tab.locator("output", has_text="1 of 3 rows").is_visible()
    table.locator("tbody tr:visible a").click()
    tab.wait_for_url("**/neurons.html#lm-5-12")
    assert tab.locator("section:visible").count() == 1
    told = tab.locator("section:visible").inner_text()
    assert "Language model, layer 5" in told and "<i>sky" in told and "Is it <b>" in told
    picture, patch = (tab.locator(f"section:visible .seen {of}").bounding_box()
                      for of in ("img", ".patch"))  # fmt: skip
    assert patch["x"] - picture["x"] == pytest.approx(picture["width"] * 2 / 8, abs=1)
    assert patch["y"] - picture["y"] == pytest.approx(picture["height"] * 1 / 4, abs=1)


def test_words_of_a_picture_layer_by_layer(visit):
    tab = visit("pictures.html")
    first = tab.locator(".wordmap").first
    cells, reply = first.locator(".cells button"), first.locator(".reply")
    assert cells.count() == 49
    cells.nth(8).hover()
    assert reply.inner_text().startswith("Layer 29, row 2, column 2:")
    first.locator("input[type=range]").focus()
    words = cells.all_text_contents()
    tab.keyboard.press("Home")
    assert reply.inner_text().startswith("Layer 4, row 2, column 2:")
    assert first.locator("output.layer").inner_text() == "4"
    assert cells.all_text_contents() != words
    colours = "cells => cells.map(cell => cell.style.background)"
    before = cells.evaluate_all(colours)
    first.locator("select").select_option("attention of the last token")
    assert cells.evaluate_all(colours) != before
    cells.nth(8).focus()
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("ArrowDown")
    assert reply.inner_text().startswith("Layer 4, row 3, column 3:")


def test_on_paper_the_images_take_the_place_of_charts(visit):
    tab = visit("index.html")
    tab.emulate_media(media="print")
    assert tab.locator(".drawn > .image").first.is_visible()
    assert tab.locator(".drawn > .chart").first.is_hidden()
