"""Plans of inference without a compiler, against closed formulas, and the command."""

import json

import pytest

from llama_jax.cli import infer
from llama_jax.config import size
from llama_jax.errors import ConfigError
from llama_jax.plan import inference, planner
from llama_jax.plan.devices import parse


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch):
    monkeypatch.setattr(planner, "environment_of", lambda devices: None)


def plan(model, device, mesh=None, **serving):
    return inference.make(inference.Serving(size(model), **serving), parse(device), mesh)


@pytest.mark.parametrize("tensor", [1, 2, 8])
def test_weights_and_cache_are_those_of_the_shape(tensor):
    m = size("llama3.1-8b")
    found = plan("llama3.1-8b", f"v5p:{8 // 4}x2x2", {"tensor": tensor, "data": 8 // tensor}, rows=16, capacity=4096)
    norms = 2 * (2 * m.num_layers + 1) * m.embed_dim
    assert found["parts"]["weights"] == (2 * m.num_params - norms) // tensor + norms
    a_token = 2 * 2 * m.num_layers * m.num_kv_heads * m.head_dim
    assert found["parts"]["cache"] == 16 * 4096 * a_token // 8
    assert found["cache_bytes_a_token"] == a_token == 131072
    read = found["parts"]["weights"] - 2 * m.vocab_size * m.embed_dim // tensor  # all but the embedding's table
    assert found["step_bytes"] == [read, read + found["parts"]["cache"]]
    assert found["decode_ms"][0] == pytest.approx(1e3 * read / 2765e9)


def test_eight_bits_halve_the_cache_and_the_weights():
    whole, small = (plan("llama3.2-1b", "v5e:1", rows=4, **more) for more in ({}, {"kv": "int8", "quantize": "int8"}))
    assert small["parts"]["cache"] / whole["parts"]["cache"] == pytest.approx((1 + 2 / 64) / 2)
    assert small["parts"]["weights"] / whole["parts"]["weights"] == pytest.approx(0.53, abs=0.01)


def test_tensor_beyond_the_heads_holds_each_head_several_times():
    found = plan("llama3.1-8b", "v5e:16", {"tensor": 16})
    assert found["cache_bytes_a_token"] == 2 * 131072
    assert plan("llama3.1-8b", "v5e:16")["mesh"]["tensor"] == 16  # the default takes all that the heads allow


def test_what_does_not_fit_or_cannot_be_says_so():
    assert not plan("llama3.1-70b", "v5e:1")["fits"] and plan("llama3.1-70b", "v5e:16")["fits"]
    with pytest.raises(ConfigError, match="200,000 positions: the model has 131,072"):
        plan("llama3.1-8b", "v5e:8", capacity=200_000)
    with pytest.raises(ConfigError, match="does not fit the model's 8 key/value heads"):
        plan("llama3.1-8b", "h100:3", {"tensor": 3})


def test_infer_prints_a_plan_for_a_published_name_without_any_file(capsys):
    argv = ["--model", "Llama-3.1-70B-Instruct", "--plan", "h100:8", "--batch_size", "4", "--capacity", "1024"]
    assert infer.main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["capacity"], found["mesh"]["tensor"]) == (4, 1024, 8)
    assert infer.main(["--model", "llama3.1-405b", "--plan", "v5e:1"]) == 1
    assert "does not fit" in capsys.readouterr().out
