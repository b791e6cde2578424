import json

import numpy as np

from mllm_jax.report import cards, charts, markup, page
from tests.helpers.html_reader import Reader

HOSTILE = "</script><script>alert(1)</script><a href='javascript:x'>&amp; $x$"


def chart():
    hovers = [[HOSTILE]]
    return [
        charts.matrix(
            HOSTILE, np.array([[np.nan]]), [HOSTILE], [HOSTILE], bounds=(0, 1), colours="counts",
            texts=hovers, hovers=hovers, opens=[["cell"]], x=HOSTILE,
        ),
        charts.curves("t", {HOSTILE: {"mean": [1.0, 2.0]}}, {HOSTILE: "#000000"}, "layer", "y"),
    ]  # fmt: skip


def texts(value):
    if isinstance(value, dict):
        value = list(value.values())
    return [text for one in value for text in texts(one)] if isinstance(value, list) else [value]


def test_names_in_charts_have_no_tags_and_nothing_is_nan():
    panels = [panel.json() for panel in chart()]
    assert panels[0].pop("name") == HOSTILE  # text of the page, not of Plotly
    told = [text for text in texts(panels) if isinstance(text, str)]
    assert "\n".join(told).count("&lt;script&gt;alert") > 6
    assert not any("<" in text or "$" in text for text in told)
    assert panels[0]["data"][0]["z"] == [[None]]


def test_a_page_with_a_chart_names_two_scripts_beside_it(tmp_path):
    figure = page.Figure("a.png", HOSTILE, chart=chart(), downloads=[("SVG", "a.svg")])
    page.write(tmp_path / "index.html", page.Page("t", "l", figure=figure))
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    reader = Reader(text)
    assert reader.open == [] and reader.tags.count("script") == 3  # two files and the data
    assert reader.links == ["plotly.min.js", "page.js", "a.png", "a.png", "a.png", "a.svg"]
    assert (tmp_path / "plotly.min.js").stat().st_size < 6e6
    assert (tmp_path / "page.js").read_text(encoding="utf-8").isascii()
    data = text.partition('<script type="application/json">')[2].partition("</script>")[0]
    assert json.loads(data) == [panel.json() for panel in chart()]


def test_data_cannot_end_its_element():
    told = markup.data({"a": HOSTILE + "<!--"})
    assert told.count("</script>") == 1 and "<!--" not in told
    data = told.removeprefix('<script type="application/json">').removesuffix("</script>")
    assert json.loads(data) == {"a": HOSTILE + "<!--"}


def test_cards_keep_hostile_texts_as_text():
    widgets = [
        cards.Cards(HOSTILE, [cards.Card(HOSTILE, "a.png", HOSTILE, cards.Box(0, 1, 2, 4)),
                              cards.Card(HOSTILE, before=HOSTILE, word=HOSTILE)]),
        cards.Words(HOSTILE, [HOSTILE, "\n", "\N{NO-BREAK SPACE}"]),
        cards.Histogram(HOSTILE, [0.0], {HOSTILE: [1, 3]}),
        cards.WordMap("a.png", HOSTILE, [3], (1, 1), [HOSTILE], [[[0]]], {HOSTILE: [[0.5]]}),
    ]  # fmt: skip
    section = page.Section(HOSTILE, HOSTILE, widgets=widgets)
    reader = Reader(page.render(page.Page("t", "l", sections=[section])))
    assert reader.open == [] and reader.tags.count("script") == 2  # page.js and the data
    assert reader.text.count(HOSTILE) >= 8
    assert "javascript:x" not in " ".join(reader.links)


def test_a_histogram_tells_its_shares():
    text = cards.Histogram("Values", [0.0, 2.0], {"own": [0, 1, 99]}).html()
    assert "own: 1.000% of 100 values from 0 to 2" in text
    assert "own: 99.000% of 100 values at or above 2" in text
    heights = [float(part.split('"')[0]) for part in text.split('height="')[1:]]
    assert heights[0] == 0 and 0 < heights[1] < heights[2] < 80


def test_a_table_to_sort_has_links_and_a_name():
    table = page.Table(["neuron", "layer"], [["a", "3"]], links=["neurons.html#a"], sortable=True)
    section = page.Section("Neurons", "r", table=table, name="neurons")
    text = page.render(page.Page("t", "l", sections=[section]))
    assert '<table class="sortable" data-name="Neurons">' in text
    assert '<td><a href="neurons.html#a">a</a></td><td class=number>3</td>' in text
    assert '<section id="neurons">' in text and '<a href="#neurons">' in text
