"""The plots of the domain-neuron study."""

import matplotlib
import numpy as np
import pytest

from experiments.domain_neurons.report import plots, stage_plots
from mllm_jax.report import page

pytestmark = pytest.mark.filterwarnings("error")


def texts(figure):
    figure.draw_without_rendering()
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text) if text.get_text()]


def test_neurons_per_layer_shows_every_count():
    shown = texts(
        plots.neurons_per_layer(
            {"lm": {"cats": [1, 4, 2], "dogs": [0, 0, 0]}, "projector": {"cats": [3], "dogs": [0]}},
            {"lm": "3 layers", "projector": "1 layer"},
        )
    )
    assert {"cats", "dogs", "lm", "3 layers", "7", "3", "0"} <= set(shown)


def test_ablation_matrix_marks_stars_and_gaps():
    change = np.array([[-0.2, 0.004], [np.nan, 0.0]])
    star = np.array([[True, False], [False, False]])
    drawn = {"lm": change}, {}, {"lm": star}, ["cats", "dogs"], 0.2, {"dogs": 8}
    shown = texts(plots.ablation_matrix(*drawn))
    assert f"{page.MINUS}20*" in shown and "+0.4" in shown and "0" in shown
    assert {"cats", "dogs (n = 8)"} <= set(shown) and "beyond chance, corrected" in shown[-1]
    assert "nan" not in " ".join(shown) and "random" not in shown


@pytest.mark.parametrize("domains", [2, 5])
def test_titles_of_an_ablation_matrix_have_room(domains):
    change, names = {"lm": np.zeros((domains, domains))}, [f"domain {i}" for i in range(domains)]
    controls = {"random neurons off\n(mean of 3)": change}
    figure = plots.ablation_matrix(change, controls, {}, names, 0.05, {})
    figure.canvas.draw()
    above, below = (ax.yaxis.label.get_window_extent() for ax in figure.axes[:2])
    assert not above.overlaps(below)
    told = next(text for text in figure.texts if "framed" in text.get_text()).get_window_extent()
    assert told.x0 >= 0 and told.x1 <= figure.bbox.x1


def test_ablation_matrix_of_no_measurement_at_all():
    nothing = {"lm": np.full((2, 2), np.nan)}
    shown = texts(plots.ablation_matrix(nothing, {"random": nothing}, {}, ["a", "b"], 0.05, {}))
    assert "none is beyond chance" in " ".join(shown) and "*" not in " ".join(shown)


@pytest.mark.parametrize("control", [{}, {"lm": {"image": {"cats": {"l2": 0.01}}}}])
def test_deviation_with_zeros_and_without_controls(control):
    selected = {"lm": {"image": {"cats": {"l2": 0.2}, "dogs": {"l2": 0.0}}, "text": {}}}
    shown = texts(plots.deviation(selected, control, {"l2": "relative L2"}, "random neurons"))
    assert {"cats", "image", "text", "relative L2", "0"} <= set(shown)
    assert ("random neurons" in shown) == bool(control)


def test_deviation_of_nothing_but_zeros():
    selected = {"lm": {"image": {"cats": {"l2": 0.0}, "dogs": {"l2": 0.0}}}}
    assert "0" in texts(plots.deviation(selected, {}, {"l2": "relative L2"}, ""))


@pytest.mark.parametrize(
    "low, high, ticks",
    [(0.003, 0.5, [0.01, 0.1]), (0.15, 0.26, [0.2]), (0.004, 0.03, [0.005, 0.01, 0.02])],
)
def test_logarithmic_ticks(low, high, ticks):
    np.testing.assert_allclose(plots._log_ticks(low, high), ticks)


def curve(start, stop, layers=12):
    mean = np.linspace(start, stop, layers)
    return {"mean": mean.tolist(), "low": (mean - 0.1).tolist(), "high": (mean + 0.1).tolist()}


def test_entropy_curves_with_decided_and_undecided_stages():
    curves = {"cats": {"image": curve(9, 5), "text": curve(8, 2)}, "dogs": {"image": curve(9, 4)}}
    decided = {"boundaries": [4, 8], "low": [3, 7], "high": [5, 9], "claimed": True}
    undecided = {"boundaries": None, "low": [3, 3], "high": [9, 9]}
    too_short = {"boundaries": None, "low": None, "high": None}
    shown = texts(stage_plots.entropy_curves(curves, {"cats": decided, "dogs": too_short}, decided))
    assert {"image tokens", "text tokens", "alignment", "processing", "dogs: undecided"} <= set(
        shown
    )
    others = decided | {"claimed": False}  # boundaries of other segments
    shown = texts(stage_plots.entropy_curves(curves, {"cats": decided, "dogs": others}, others))
    assert "alignment" not in shown and "stages undecided" not in shown
    shown = texts(
        stage_plots.entropy_curves(curves, {"cats": undecided, "dogs": decided}, undecided)
    )
    assert "stages undecided" in shown and "alignment" not in shown
    assert "alignment" not in texts(stage_plots.entropy_curves(curves))
    other = decided | {"claimed": False}
    shown = texts(stage_plots.entropy_curves(curves, {"cats": other}, other))
    assert not {"alignment", "stages undecided"} & set(shown)


def test_overview_without_a_picture():
    curves = {"cats": curve(9, 5), "dogs": curve(9, 4)}
    change, star = np.zeros((2, 2)), np.zeros((2, 2), bool)
    titles = {"curves": "entropy", "matrix": "accuracy"}
    shown = texts(plots.overview(None, curves, None, change, star, titles, 0.05))
    assert {"entropy", "accuracy", "cats", "dogs"} <= set(shown)
