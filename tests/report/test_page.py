import dataclasses

from mllm_jax.report import page
from tests.helpers.html_reader import Reader

SECTION = page.Section(
    title="A <b>",
    reading="Rises & falls.",
    figures=[page.Figure("figures/a.png", 'the "a"', "Caption", width=800)],
    table=page.Table(["name", "points"], [["x < y", f"{page.MINUS}1.5"], ["z", page.DASH]]),
    data=[("a.csv", "tables/a.csv")],
    note="How.",
)


def read(**changes):
    content = {"title": "T & T", "lead": "Why?", "sections": [SECTION], **changes}
    return Reader(page.render(page.Page(**content)))


def test_is_well_formed_and_escaped():
    reader = read(facts=[("5", "domains")], data=[("results.json", "results.json")])
    assert reader.open == []
    text = " ".join(reader.text)
    for shown in (
        "T & T",
        "A <b>",
        "Rises & falls.",
        "x < y",
        f"{page.MINUS}1.5",
        "Caption",
        "How.",
        "domains",
    ):
        assert shown in text
    assert "b" not in reader.tags


def test_links_are_relative_and_nothing_is_fetched():
    reader = read()
    links = [link for link in reader.links if not link.startswith("#")]
    assert links == ["figures/a.png", "figures/a.png", "tables/a.csv"]
    assert not {"script", "link", "iframe"} & set(reader.tags)
    assert "url(" not in page.STYLE and "@import" not in page.STYLE


def test_dark_mode_and_numbers_on_the_right():
    text = page.render(page.Page("t", "l", sections=[SECTION]))
    assert "prefers-color-scheme: dark" in text
    assert f"<td>x &lt; y</td><td class=number>{page.MINUS}1.5</td>" in text


def test_a_table_says_what_its_dash_means():
    meaning = f"{page.DASH}: not measured"
    assert " ".join(read().text).count(meaning) == 1
    whole = dataclasses.replace(SECTION, table=page.Table(["name"], [["z"]]))
    assert meaning not in " ".join(read(sections=[whole]).text)


def test_a_page_of_nothing_is_a_page():
    assert read(sections=[]).open == []


def test_writes_a_file(tmp_path):
    content = page.Page("t", "l", sections=[SECTION])
    page.write(tmp_path / "index.html", content)
    assert (tmp_path / "index.html").read_text(encoding="utf-8") == page.render(content)


def test_no_text_turns_the_letters_after_it():
    turned = "exe.\u202egnp.\u2066x"
    figure = page.Figure("figures/a.png", turned, turned)
    table = page.Table((turned, "b"), ((turned, "1"),))
    section = page.Section(turned, turned, (figure,), table, ((turned, "a.csv"),), turned)
    made = page.render(page.Page(turned, turned, ((turned, turned),), figure, (section,)))
    assert not set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069") & set(made)
    assert made.count("exe.\N{REPLACEMENT CHARACTER}gnp.\N{REPLACEMENT CHARACTER}x") > 10
