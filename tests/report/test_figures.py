import matplotlib
import numpy as np
import pytest

from mllm_jax.report import figures, page

pytestmark = pytest.mark.filterwarnings("error")


def texts(figure):
    figure.draw_without_rendering()
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text) if text.get_text()]


def test_same_data_same_bytes_and_no_date(tmp_path):
    values = {"lm": {"cats": [1, 4, 2], "dogs": [0, 2, 9]}}
    for name in ("a.png", "b.png"):
        figures.save(figures.neurons_per_layer(values, {"lm": "3 layers"}), tmp_path / name)
    first, second = ((tmp_path / name).read_bytes() for name in ("a.png", "b.png"))
    assert first == second
    assert b"matplotlib" not in first and b"tIME" not in first


def test_drawing_leaves_the_global_style_alone():
    before = dict(matplotlib.rcParams)
    figures.accuracy({"cats": {"accuracy": 0.5, "low": 0.4, "high": 0.6, "chance": 0.25, "n": 9}})
    assert dict(matplotlib.rcParams) == before


def test_neurons_per_layer_shows_every_count():
    shown = texts(
        figures.neurons_per_layer(
            {"lm": {"cats": [1, 4, 2], "dogs": [0, 0, 0]}, "projector": {"cats": [3], "dogs": [0]}},
            {"lm": "3 layers", "projector": "1 layer"},
        )
    )
    assert {"cats", "dogs", "lm", "3 layers", "7", "3", "0"} <= set(shown)


def test_ablation_matrix_marks_stars_and_gaps():
    change = np.array([[-0.2, 0.004], [np.nan, 0.0]])
    star = np.array([[True, False], [False, False]])
    shown = texts(
        figures.ablation_matrix({"lm": change}, {}, {"lm": star}, ["cats", "dogs"], "random")
    )
    assert f"{page.MINUS}20*" in shown and "+0.4" in shown and "0" in shown
    assert "nan" not in " ".join(shown) and "random" not in shown


@pytest.mark.parametrize("domains", [2, 5])
def test_titles_of_an_ablation_matrix_have_room(domains):
    change, names = {"lm": np.zeros((domains, domains))}, [f"domain {i}" for i in range(domains)]
    figure = figures.ablation_matrix(change, change, {}, names, "random neurons off\n(mean of 3)")
    figure.canvas.draw()
    above, below = (ax.yaxis.label.get_window_extent() for ax in figure.axes[:2])
    assert not above.overlaps(below)
    told = next(text for text in figure.texts if "framed" in text.get_text()).get_window_extent()
    assert told.x0 >= 0 and told.x1 <= figure.bbox.x1


def test_ablation_matrix_of_no_measurement_at_all():
    nothing = {"lm": np.full((2, 2), np.nan)}
    assert texts(figures.ablation_matrix(nothing, nothing, {}, ["cats", "dogs"], "random"))


@pytest.mark.parametrize("control", [{}, {"lm": {"image": {"cats": {"l2": 0.01}}}}])
def test_deviation_with_zeros_and_without_controls(control):
    selected = {"lm": {"image": {"cats": {"l2": 0.2}, "dogs": {"l2": 0.0}}, "text": {}}}
    shown = texts(figures.deviation(selected, control, {"l2": "relative L2"}))
    assert {"cats", "image", "text", "relative L2", "0"} <= set(shown)
    assert ("random neurons" in shown) == bool(control)


def test_deviation_of_nothing_but_zeros():
    selected = {"lm": {"image": {"cats": {"l2": 0.0}, "dogs": {"l2": 0.0}}}}
    assert "0" in texts(figures.deviation(selected, {}, {"l2": "relative L2"}))


@pytest.mark.parametrize(
    "low, high, ticks",
    [(0.003, 0.5, [0.01, 0.1]), (0.15, 0.26, [0.2]), (0.004, 0.03, [0.005, 0.01, 0.02])],
)
def test_logarithmic_ticks(low, high, ticks):
    np.testing.assert_allclose(figures._log_ticks(low, high), ticks)


def curve(start, stop, layers=12):
    mean = np.linspace(start, stop, layers)
    return {"mean": mean.tolist(), "low": (mean - 0.1).tolist(), "high": (mean + 0.1).tolist()}


def test_entropy_curves_with_decided_and_undecided_stages():
    curves = {"cats": {"image": curve(9, 5), "text": curve(8, 2)}, "dogs": {"image": curve(9, 4)}}
    decided = {"boundaries": [4, 8], "low": [3, 7], "high": [5, 9]}
    undecided = {"boundaries": None, "low": [3, 3], "high": [9, 9]}
    too_short = {"boundaries": None, "low": None, "high": None}
    shown = texts(figures.entropy_curves(curves, {"cats": decided, "dogs": too_short}, decided))
    assert {"image tokens", "text tokens", "alignment", "processing", "dogs: undecided"} <= set(
        shown
    )
    shown = texts(figures.entropy_curves(curves, {"cats": undecided, "dogs": decided}, undecided))
    assert "stages undecided" in shown and "alignment" not in shown
    assert "alignment" not in texts(figures.entropy_curves(curves))


def test_token_map_shows_each_word_and_survives_any_token():
    words = [[[" dog", "\n"], ["的", "$x_1$"]], [["", "<|im_end|>"], ["Ġcat", "Mediterranean"]]]
    picture = np.zeros((30, 40, 3), np.uint8)
    entropy = np.arange(8.0).reshape(2, 2, 2)
    shown = texts(figures.token_map(picture, words, entropy, ["layer 0", "layer 9"]))
    assert {"dog", "↵", "▯", "$x_1$", "␣", "<|im_end|>", "cat"} <= set(shown)
    assert {"picture", "layer 0", "layer 9", "Mediterranean"} <= set(shown)
    assert figures.shown(" Mediterranean", 8) == "Mediter…"


def test_overlap_ignores_the_diagonal():
    shown = texts(
        figures.overlap({"lm": np.array([[1, 0.25], [0.25, 1]])}, {"lm": [0, 31, 4]}, ["a", "b"])
    )
    assert {"0.25", "31", "4"} <= set(shown) and "1.00" not in shown


def test_overview_without_a_picture():
    curves = {"cats": curve(9, 5), "dogs": curve(9, 4)}
    change, star = np.zeros((2, 2)), np.zeros((2, 2), bool)
    titles = {"curves": "entropy", "matrix": "accuracy"}
    shown = texts(figures.overview(None, curves, None, change, star, titles))
    assert {"entropy", "accuracy", "cats", "dogs"} <= set(shown)


def test_labels_keep_their_order_and_their_distance():
    places = figures._spread([3.0, 1.0, 1.1, 1.05], 0.5)
    assert places[0] == 3.0
    np.testing.assert_allclose(np.diff(np.array(places)[[1, 3, 2]]), 0.5)
    assert np.mean(places[1:]) == pytest.approx(1.05)


def test_many_domains_have_different_colours():
    for count in (2, 7, 12):
        assert len(set(figures.palette([str(i) for i in range(count)]).values())) == count
