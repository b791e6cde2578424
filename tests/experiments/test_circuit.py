"""The circuit study: pairs, the graph, and a planted circuit that is found, on a tiny model."""

from __future__ import annotations

import json

import numpy as np
import PIL.Image
import pytest

import mllm_jax as mj
from experiments.circuit import figures, graph, measures
from experiments.circuit import pairs as pairs_
from experiments.circuit import study as circuit
from mllm_jax.analysis.edges import EdgeEffects, Node
from mllm_jax.data import batching, domains
from mllm_jax.interventions import spec
from tests.helpers import contrasts, in_process, random_inputs, tiny

pytestmark = pytest.mark.usefixtures("quick_to_compile")

CONFIG = "configs/embedded_circuit.py:quick"
LABELS = ("a cat", "a dog", "a ship")
LAYER, HEAD = 2, 1  # where the circuit is planted
SMALL = {
    "model": "tiny", "partner": "class", "styles": ("category",), "keep": "apart",
    "train_per_domain": 24, "test_per_domain": 24, "sizes": (1, 6), "circuit": 2, "draws": 2,
    "exact_nodes": 4, "exact_pairs": 3, "batch_size": 3, "edges": 6,
}  # fmt: skip


def question(prompt: str, answer: str, style: str = "category") -> domains.Question:
    return domains.Question(style, prompt, answer, (answer, "no such"))


def example(name: str, domain: str, *questions: domains.Question) -> domains.Example:
    return domains.Example(name, domain, questions[0].answer, b"", questions)


@pytest.fixture(scope="module")
def processor(tiny_config):
    return tiny.processor(tiny_config)


def names(found: list[pairs_.Pair]) -> list[tuple[str, str]]:
    return [(pair.clean[0].id, pair.corrupt[0].id) for pair in found]


def test_pictures_are_paired_by_question_answer_and_domain(processor):
    asked, other = "what is shown ?", "which one ?"
    sides = [
        (shown, shown.questions[0])
        for shown in (
            example("a", "one", question(asked, "a cat")),
            example("b", "one", question(asked, "a cat")),  # the same answer
            example("c", "one", question(other, "a dog")),  # another question
            example("d", "two", question(asked, "a ship")),
            example("e", "one", question(asked, "a dog")),
            example("f", "two", question(other, "star")),
        )
    ]
    within = pairs_.swap_pictures(processor, sides, "class")
    across = pairs_.swap_pictures(processor, sides, "domain")
    assert names(within) == [("a", "e")] and names(across) == [("a", "d"), ("c", "f")]
    cat, dog = (processor.answer_ids(text) for text in ("a cat", "a dog"))
    assert within[0].answers == (tuple(cat[:1]), cat[1], dog[1])  # after "a"
    assert across[1].answers.shared == ()
    with pytest.raises(ValueError, match="config.partner=class: no two pictures of one domain"):
        pairs_.swap_pictures(processor, sides[2:4], "class")


def test_an_answer_that_continues_another_is_told_apart_by_its_end(processor):
    sides = [(None, question("what ?", answer)) for answer in ("a cat", "a cat dog")]
    cat, longer = (processor.answer_ids(side[1].answer) for side in sides)
    found = pairs_.answers_of(processor, *sides)
    assert found == (tuple(cat[:2]), cat[2], longer[2]) and cat[2] == processor.stop_ids[0]
    assert pairs_.answers_of(processor, sides[0], sides[0]) is None


class Shown(domains.Example):
    image = tiny.picture(0)


def test_questions_are_paired_by_length(processor):
    short, shorter = question("is it a cat ?", "yes"), question("a cat ?", "no")
    other, same = question("is it a dog ?", "no"), question("is it a star ?", "yes")
    wrong_style = question("is it a ship ?", "no", style="choice")

    def shown(name: str, *questions: domains.Question) -> domains.Example:
        return Shown(name, "one", "a cat", b"", questions)

    pictures = [
        shown("a", short, shorter, wrong_style, same, other), shown("b", short, shorter),
        shown("c", short, other), shown("d", short),
    ]  # fmt: skip
    found = pairs_.swap_questions(processor, pictures, ("category",))
    assert names(found) == [("a", "a"), ("c", "c")]
    prompts = [(pair.clean[1].prompt, pair.corrupt[1].prompt) for pair in found]
    # The second in turn: its clean answer is the other one.
    assert prompts == [(short.prompt, other.prompt), (other.prompt, short.prompt)]
    with pytest.raises(ValueError, match="config.swap=question: no picture has two questions"):
        pairs_.swap_questions(processor, pictures[1:2], ("category",))


def test_the_graph_has_the_edges_among_nodes_of_the_circuit(tiny_config):
    lm = tiny_config.lm  # 4 layers of 4 heads that share 2 keys and values
    whole = EdgeEffects.of(np.zeros((1, 1, 1)), lm)
    values = np.zeros((1, len(whole.senders), len(whole.receivers)))

    def put(sender: Node, receiver: Node, value: float) -> None:
        values[0, whole.senders.index(sender), whole.receivers.index(receiver)] = value

    shared = lm.heads // lm.kv_heads
    key = Node(3, "k", 0)  # of the heads 0 to `shared`
    put(Node(1, "head", 2), key, -5.0)
    put(Node(1, "head", 2), Node(3, "q", 1), 2.0)
    put(Node(-1, "embed"), Node(1, "v", 2 // shared), 3.0)
    put(Node(1, "head", 3), Node(3, "q", 1), 9.0)  # from outside of the circuit
    put(Node(3, "head", 1), Node(lm.layers, "output"), 4.0)
    inside = np.zeros((lm.layers, lm.heads + 1), bool)
    inside[1, 2] = inside[3, 1] = True
    effects = EdgeEffects.of(values, lm)
    found = graph.within(effects, inside, 4, lm.kv_heads)
    assert [(tuple(row["from"]), tuple(row["to"]), row["score"]) for row in found] == [
        ((1, "head 2"), (3, "head 1"), -5.0), ((3, "head 1"), (lm.layers, "output"), 4.0),
        ((-1, "embed"), (1, "head 2"), 3.0), ((1, "head 2"), (3, "head 1"), 2.0),
    ]  # fmt: skip
    assert [row["receiver"] for row in found] == ["3 k 0", "output", f"1 v {2 // shared}", "3 q 1"]
    assert len(graph.within(effects, inside, 2, lm.kv_heads)) == 2
    assert graph.owners(key, lm.heads, lm.kv_heads) == [(3, f"head {n}") for n in range(shared)]
    results = {
        "heads": lm.heads, "layers": lm.layers, "kinds": ["text"], "graph": found,
        "nodes": [{"kind": "text", "layer": 1, "part": "head 2", "score": 1.0}],
    }  # fmt: skip
    at = figures.positions(results)
    assert at[1, "head 2"] == (2, 1) and at[-1, "embed"][1] < at[lm.layers, "output"][1]
    assert figures.graph(results).axes
    assert len(figures.graph_panel(results).json()["data"]) == len(found) + 1


def test_correlations_and_the_nodes_that_are_tested():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 30))
    y += x
    value, low, high = measures.pearson(x, y)
    np.testing.assert_allclose(value, np.corrcoef(x, y)[0, 1], atol=1e-12)
    assert low < value < high
    assert measures.pearson(x, np.ones(30)) == (0, 0, 0)
    scores = np.arange(24.0).reshape(2, 3, 4)
    scores[0, 0, 1] = -30  # the largest in size
    mask = measures.tested_nodes(scores, 7, seed=1)
    assert mask.sum() == 7 and mask[0, 0, 1] and mask[1, 2, [1, 2, 3]].all()
    assert (mask != measures.tested_nodes(scores, 7, seed=2)).any()
    assert measures.tested_nodes(scores, 100, seed=0).sum() == 24  # no more than there are


def test_errors_come_before_anything_is_read(config_of):
    for field, says in (
        ({"swap": "both"}, "config.swap: 'both' is not one of picture, question"),
        ({"partner": "any"}, "config.partner: 'any' is not one of class, domain"),
        ({"keep": "all"}, "config.keep: 'all' is not one of answered, apart"),
        ({"steps": -1}, "config.steps=-1"),
        (
            {"sizes": (0, 4)},
            r"config.sizes=\(0, 4\), config.circuit=5: numbers of nodes must be 1 or",
        ),
    ):
        with pytest.raises(ValueError, match=says):
            circuit.run(config_of(CONFIG, model="nowhere", **field), None)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Pictures of one colour, each with a question whose answers begin with one word."""
    colours = np.random.default_rng(0).integers(0, 256, (160, 3)).tolist()
    images = (PIL.Image.new("RGB", (24, 24), tuple(colour)) for colour in colours)
    return in_process.write_questions(tmp_path_factory.mktemp("pictures"), images, LABELS)


@pytest.fixture(scope="module")
def planted():
    return contrasts.one_head_model(random_inputs.TINY, LAYER, HEAD)


@pytest.fixture(scope="module")
def study(tmp_path_factory, config_of, tiny_config, planted, pictures):
    """Runs the study of the planted model in this process; its folder."""

    def run(folder=None, edits=None, **fields):
        config = config_of(CONFIG, paths=(pictures,), **SMALL | fields)
        folder = folder or tmp_path_factory.mktemp("circuit") / "work"
        loaded = planted, tiny.processor(tiny_config)
        return in_process.run(circuit, config, folder, loaded, edits)

    return run


@pytest.fixture(scope="module")
def finished(study):
    return study()


def metrics(workdir) -> list[dict[str, np.ndarray]]:
    """The metric of all training pairs, in batches."""
    return [dict(np.load(path)) for path in sorted((workdir / "steps/pairs").glob("train-*.npz"))]


@pytest.mark.slow
def test_a_planted_circuit_is_found(finished):
    results = json.loads((finished / "results.json").read_text())
    first, second = results["nodes"]
    assert (first["kind"], first["layer"], first["part"]) == ("text", LAYER, f"head {HEAD}")
    assert first["score"] > 100 * abs(second["score"])
    for row in results["curves"]:
        if row["circuit"] == "found":
            assert row["faithfulness"] == pytest.approx(1, abs=1e-3)
            assert row["left"] == pytest.approx(0, abs=1e-3)
    at_one = {row["circuit"]: row for row in results["curves"] if row["nodes"] == 1}
    assert at_one["random0"]["faithfulness"] == pytest.approx(0, abs=1e-3)
    assert at_one["random0"]["left"] == pytest.approx(1, abs=1e-3)
    lost = {(r["layer"], r["part"]): r["value"] for r in results["minimality"] if r["circuit"] == "found"}  # fmt: skip
    assert lost.pop((LAYER, f"head {HEAD}")) == pytest.approx(1, abs=1e-3)
    assert all(abs(value) < 1e-3 for value in lost.values())
    ends = results["difference"]
    assert ends["clean"]["value"] > ends["corrupt"]["value"]
    # The head carries all of the difference; the last pair, which fills up a batch, counts once.
    clean, corrupt = (
        np.concatenate([a[name] for a in metrics(finished)]) for name in ("clean", "corrupt")
    )
    kept = (clean - corrupt)[clean - corrupt > 1e-3]
    assert len(kept) == results["pairs"]["train"]["kept"] and len(kept) % 3
    np.testing.assert_allclose(first["score"], kept.mean(), rtol=0.02)
    # All that the head adds goes to the output, and what it reads comes from the embedding.
    drawn = {(row["sender"], row["receiver"]): row["score"] for row in results["graph"]}
    into_output = {edge: score for edge, score in drawn.items() if edge[1] == "output"}
    assert max(into_output, key=into_output.get) == (f"{LAYER} head {HEAD}", "output")
    np.testing.assert_allclose(
        into_output[f"{LAYER} head {HEAD}", "output"], first["score"], rtol=0.1
    )
    edges = {(row["sender"], row["receiver"]) for row in results["edges"] if abs(row["score"]) > 1e-4}  # fmt: skip
    shared = random_inputs.TINY.lm.heads // random_inputs.TINY.lm.kv_heads
    assert ("embed", f"{LAYER} v {HEAD // shared}") in edges
    assert {a for a, _ in edges} == {"embed", f"{LAYER} head {HEAD}"}
    by_name = {(row["kind"], row["layer"], row["part"]): row for row in results["exact"]["nodes"]}
    planted = by_name["text", LAYER, f"head {HEAD}"]
    assert results["exact"]["pairs"] == 3
    np.testing.assert_allclose(planted["exact"], kept[:3].mean(), rtol=0.02)
    np.testing.assert_allclose(planted["estimate"], kept[:3].mean(), rtol=0.02)
    assert sum(abs(row["exact"]) > 1e-4 for row in by_name.values()) == 1
    for name in ("index.html", "circuit.npz", "manifest.json", "figures/curves.png",
                 "figures/graph.svg", "figures/minimality.png", "figures/exact.png", "tables/curves.csv",
                 "tables/nodes.csv", "tables/edges.csv", "tables/minimality.csv", "tables/exact.csv"):  # fmt: skip
        assert (finished / name).stat().st_size > 20


@pytest.mark.slow
def test_the_metric_is_the_difference_of_the_answers_log_probabilities(
    finished, planted, processor, pictures
):
    """Also where the answers begin alike: the rest is scored after what they share."""
    results = json.loads((finished / "results.json").read_text())
    shown = next(iter(domains.load_user_domains([pictures], "train").values()))
    sides = batching.ask([shown[i] for i in range(24)], ("category",))
    pairs = pairs_.swap_pictures(processor, sides, "class")
    assert results["pairs"]["train"]["candidates"] == len(pairs) > 2
    assert {pair.answers.shared for pair in pairs} == {tuple(processor.answer_ids("a", end=False))}
    read = metrics(finished)
    for side, name in enumerate(("clean", "corrupt")):
        found = np.concatenate([arrays[name] for arrays in read])
        images = [pair[side][0].image for pair in pairs]
        batch = processor(images, [pair[side][1].prompt for pair in pairs])
        options = [[processor.answer_ids(pair[s][1].answer, end=False) for s in range(2)] for pair in pairs]  # fmt: skip
        scores = np.asarray(mj.score(planted, batch, np.array(options, np.int32)))
        np.testing.assert_allclose(found, scores[:, 0] - scores[:, 1], atol=2e-5)
    kept = np.concatenate([arrays["clean"] - arrays["corrupt"] for arrays in read]) > 1e-3
    assert results["pairs"]["train"]["kept"] == kept.sum() < len(kept)


@pytest.mark.slow
def test_killed_anywhere_it_ends_with_the_same_bytes(study, finished, tmp_path):
    steps = sum(path.is_file() for path in (finished / "steps").rglob("*"))
    for done in range(0, steps, 3):
        with in_process.killed_after(done):
            study(tmp_path / "killed")
    in_process.assert_same_files(finished, study(tmp_path / "killed"))


@pytest.mark.slow
def test_without_a_difference_there_is_no_circuit(study):
    with pytest.raises(ValueError, match="config.keep=apart: the metric is higher .* none of"):
        study(edits=spec.parse(f"ablate lm.attn.heads[{LAYER}]"))
    with pytest.raises(ValueError, match="41 is more than the 40 nodes of this model at tokens"):
        study(sizes=(1, 41))
