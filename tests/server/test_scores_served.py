"""Scores over HTTP are those of transformers and PEFT, in fp32, of the base model and an adapter: what
lm-eval's local-completions asks for, and embeddings."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from torch.nn import functional

from tests.engine.oracle import VOCAB_SIZE, make_adapter, make_model, make_prompt, reference_model
from toppings.config import Config
from toppings.engine.base import open_registry
from toppings.engine.client import EngineClient
from toppings.server.app import create_app
from toppings.synth import write_tokenizer
from toppings.text import TextModel

CLOSE: dict[str, Any] = {"atol": 1e-3, "rtol": 0.0}
Post = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("scores")
    model = make_model(root / "base")
    adapter = make_adapter(root / "all-r8", model, rank=8)
    write_tokenizer(model, VOCAB_SIZE)
    return {"base": model, "all-r8": adapter}


@pytest.fixture(scope="module")
def post(paths: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Post]:
    """Posts to a server of a real engine."""
    settings = {"model": str(paths["base"]), "state_dir": str(tmp_path_factory.mktemp("state"))}
    numbers = {"num_threads": 1, "kv_cache_bytes": 8 * 2**20, "device_pool_bytes": 2**24}
    config = Config.from_settings(
        {**settings, **numbers, "dtype": "float32", "max_num_batched_tokens": 48, "max_num_seqs": 4}
    )
    with asyncio.Runner() as runner:
        registry = open_registry(config.engine)
        registry.register("all-r8", paths["all-r8"])
        client = runner.run(EngineClient.start(config.engine))
        app = create_app(client, registry, TextModel.load(paths["base"]), config)
        http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://toppings")

        def post(path: str, **body: object) -> dict[str, Any]:
            reply = runner.run(http.post(path, json=body, timeout=None))
            assert reply.status_code == 200, reply.text
            content: dict[str, Any] = reply.json()
            return content

        yield post
        runner.run(http.aclose())
        runner.run(client.shutdown(0.0))
        registry.close()


@torch.inference_mode()
def reference(paths: dict[str, Path], name: str, tokens: list[int]) -> tuple[Any, Any]:
    """Log-probabilities of the tokens but the first, [P - 1, V] before they are picked, and hidden states."""
    model = reference_model(paths["base"], None if name == "base" else paths[name])
    answer = model(input_ids=torch.tensor([tokens]), output_hidden_states=True)
    return answer.logits[0, :-1].log_softmax(-1), answer.hidden_states[-1][0]


@pytest.mark.parametrize("name", ["base", "all-r8"])
def test_log_likelihoods_of_many_prompts(post: Post, paths: dict[str, Path], name: str) -> None:
    """Prompts of one request, longer and shorter than a step takes; the answer's last token is one drawn."""
    prompts = [make_prompt(i, length) for i, length in enumerate((2, 17, 48, 49, 130, 200))]
    for max_tokens in (0, 1):
        body = {"model": name, "prompt": prompts, "echo": True, "logprobs": 1, "max_tokens": max_tokens}
        choices = post("/v1/completions", **body, temperature=0)["choices"]
        for prompt, choice in zip(prompts, choices, strict=True):
            told, (expected, _) = choice["logprobs"], reference(paths, name, prompt)
            assert len(told["token_logprobs"]) == len(prompt) + max_tokens
            values = torch.tensor(told["token_logprobs"][1 : len(prompt)])
            wanted = expected.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
            torch.testing.assert_close(values, wanted, **CLOSE)
            best = torch.tensor([max(top.values()) for top in told["top_logprobs"][1 : len(prompt)]])
            torch.testing.assert_close(best, expected.amax(-1), **CLOSE)
            is_greedy = values == best  # how lm-eval asks
            assert is_greedy.tolist() == (expected.argmax(-1) == torch.tensor(prompt[1:])).tolist()


@pytest.mark.parametrize("name", ["base", "all-r8"])
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_embeddings_are_pooled_hidden_states(
    post: Post, paths: dict[str, Path], name: str, pooling: str
) -> None:
    prompts = [make_prompt(i, length) for i, length in enumerate((1, 30, 120))]
    data = post("/v1/embeddings", model=name, input=prompts, pooling=pooling)["data"]
    for prompt, each in zip(prompts, data, strict=True):
        _, hidden = reference(paths, name, prompt)
        expected = functional.normalize(hidden[-1] if pooling == "last" else hidden.mean(0), dim=0)
        torch.testing.assert_close(torch.tensor(each["embedding"]), expected, **CLOSE)
