import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

from mllm_jax.report import figures, style

pytestmark = pytest.mark.filterwarnings("error")


def texts(figure):
    figure.draw_without_rendering()
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text) if text.get_text()]


def test_same_data_same_bytes_and_no_date(tmp_path):
    values = {"lm": np.array([[1, 0.25], [0.25, 1]])}, {"lm": [0, 31, 4]}
    for name in ("a.png", "b.png"):
        style.save(figures.overlap(*values, ["a", "b"]), tmp_path / name)
    first, second = ((tmp_path / name).read_bytes() for name in ("a.png", "b.png"))
    assert first == second
    assert b"matplotlib" not in first and b"tIME" not in first


def test_the_last_digits_of_a_layout_are_not_in_its_bytes(tmp_path):
    """The solver of constrained layout returns others from call to call, here as from 0 to 7e-13."""
    drawn = []
    for jitter in (0, 7e-13):
        figure = figures.overlap({"lm": np.eye(2)}, {"lm": [0, 31, 4]}, ["a", "b"])
        engine = figure.get_layout_engine()
        run = engine.execute

        def execute(figure, run=run, jitter=jitter):
            run(figure)
            for ax in figure.axes:
                box = ax.get_position(original=True)
                ax._set_position(box.translated(jitter, jitter))

        engine.execute = execute
        style.save(figure, tmp_path / "a.svg")
        drawn.append((tmp_path / "a.svg").read_bytes())
    assert drawn[0] == drawn[1]


def test_drawing_leaves_the_global_style_alone():
    before = dict(matplotlib.rcParams)
    figures.accuracy({"cats": {"accuracy": 0.5, "low": 0.4, "high": 0.6, "chance": 0.25, "n": 9}})
    assert dict(matplotlib.rcParams) == before


def test_token_map_shows_each_word_and_survives_any_token():
    words = [[[" dog", "\n"], ["的", "$x_1$"]], [["", "<|im_end|>"], ["Ġcat", "Mediterranean"]]]
    picture = np.zeros((30, 40, 3), np.uint8)
    entropy = np.arange(8.0).reshape(2, 2, 2)
    shown = texts(figures.token_map(picture, words, entropy, ["layer 0", "layer 9"]))
    assert {"dog", "↵", "▯", "$x_1$", "␣", "<|im_end|>", "cat"} <= set(shown)
    assert {"picture", "layer 0", "layer 9", "Mediterranean"} <= set(shown)
    assert figures.printable(" Mediterranean", 8) == "Mediter…"
    assert figures.printable("\N{NO-BREAK SPACE}") == figures.printable("\u2003") == "␣"


def test_cells_of_a_token_map_have_the_colours_of_its_bar():
    """The picture does not shine through them."""
    figure = Figure()
    ax = figure.subplots()
    picture, entropy = np.full((30, 30, 3), 255, np.uint8), np.array([[1.0, 3.0]])
    image = figures.token_panel(ax, picture, [["a", "b"]], entropy, (1.0, 3.0), 3.0)
    assert list(ax.images) == [image] and image.get_alpha() is None


@pytest.mark.parametrize("layers", [1, 2, 3, 5, 7])
def test_a_token_map_has_no_empty_panel(layers):
    figure = figures.token_map(
        np.zeros((8, 8, 3), np.uint8), [[["a"] * 7] * 7] * layers, np.ones((layers, 7, 7)),
        [str(layer) for layer in range(layers)],
    )  # fmt: skip
    panels = [ax for ax in figure.axes if ax.get_label() != "<colorbar>"]
    assert len(panels) == layers + 1 and all(len(ax.images) for ax in panels)


def test_overlap_ignores_the_diagonal():
    shown = texts(
        figures.overlap({"lm": np.array([[1, 0.25], [0.25, 1]])}, {"lm": [0, 31, 4]}, ["a", "b"])
    )
    assert {"0.25", "31", "4"} <= set(shown) and "1.00" not in shown


def test_labels_keep_their_order_and_their_distance():
    places = figures._separate([3.0, 1.0, 1.1, 1.05], 0.5)
    assert places[0] == 3.0
    np.testing.assert_allclose(np.diff(np.array(places)[[1, 3, 2]]), 0.5)
    assert np.mean(places[1:]) == pytest.approx(1.05)


def test_many_domains_have_different_colours():
    for count in (2, 7, 12):
        assert len(set(style.palette([str(i) for i in range(count)]).values())) == count
