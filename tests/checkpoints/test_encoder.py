import dataclasses

import pytest

from mllm_jax.checkpoints.networks import encoder

TABLE = encoder.table("thing", hidden_size=24, num_attention_heads=4, hidden_act="gelu")


@dataclasses.dataclass(frozen=True)
class Config:
    width: int
    heads: int
    act: str


def read(fields, **more):
    problems = []
    return encoder.read(fields, TABLE | more, ("dropout",), "part.", problems), problems


def test_fields_become_arguments_and_come_back():
    known, problems = read({"hidden_size": 32, "hidden_act": "gelu_new", "dropout": 0.1})
    assert problems == []
    arguments = encoder.arguments(known)
    assert arguments == {"width": 32, "heads": 4, "act": "gelu_tanh"}
    fields = encoder.to_hf(Config(**arguments), "thing")
    assert fields == {"model_type": "thing", "hidden_size": 32, "num_attention_heads": 4,
                      "hidden_act": "gelu_pytorch_tanh"}  # fmt: skip
    assert encoder.arguments(read(fields)[0]) == arguments


@pytest.mark.parametrize(
    "fields, problem",
    [
        ({"hidden_size": 30}, "part.hidden_size=30 is not a multiple of num_attention_heads=4"),
        ({"hidden_act": "tanh"}, "part.hidden_act='tanh' is not supported, only "),
        ({"model_type": "other"}, "part.model_type='other' is not supported, only 'thing'"),
        ({"intermediate_size": 8}, "unknown field part.intermediate_size"),
        ({"image_size": 30, "patch_size": 4},
         "part.image_size=30 is not a multiple of patch_size=4"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(fields, problem):
    sizes = encoder.table("thing", image_size=28, patch_size=14) if "patch_size" in fields else {}
    _, problems = read(fields, **sizes)
    assert len(problems) == 1 and problems[0].startswith(problem)
