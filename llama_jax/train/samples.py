"""Samples of the model during training, as `llama_jax.load` would give them. Imported only by runs that sample."""

from __future__ import annotations

from typing import Any

import jax

from llama_jax import parallel
from llama_jax.infer.llama import Llama
from llama_jax.parallel import processes
from llama_jax.params import Params
from llama_jax.run_config import RunConfig
from llama_jax.storage import work_folder
from llama_jax.text import chat_template
from llama_jax.text.tokenizer import Tokenizer

_TEMPERATURE, _TOP_P = 0.7, 0.9  # of continuations; answers are greedy, so that those of two steps can be compared


class TrainingSampler:
    """A function of the current weights that returns one text for each of log.sample_prompts. It compiles once."""

    def __init__(self) -> None:
        self._llama: Llama | None = None

    def __call__(self, run: RunConfig, params: Params, tokenizer: Tokenizer, mesh: jax.sharding.Mesh) -> list[str]:
        """The continuations of the prompts, or the answers to them, by the model with these params."""
        if self._llama is None:
            dtype = parallel.compute_dtype(run.train.compute_dtype)
            folder = work_folder(run.output, processes.number())
            template = chat_template.read_folder(folder)  # the run's, not init_from's
            self._llama = Llama(run.shape, params, tokenizer, mesh=mesh, dtype=dtype, chat_template=template)
        else:
            self._llama.set_params(params)
        prompts: list[Any] = list(run.log.sample_prompts)
        stops, temperature = self._llama.stop_tokens, _TEMPERATURE
        if run.log.sample_as == "chat":
            prompts = [self._llama.encode_dialog([{"role": "user", "content": prompt}]) for prompt in prompts]
            stops, temperature = self._llama.chat_stop_tokens, 0.0
        results = self._llama.generate(
            prompts,
            max_new_tokens=run.log.sample_tokens,
            temperature=temperature,
            top_p=_TOP_P,
            seed=run.seed,
            stop_tokens=stops,
        )
        self._llama.set_params(None)  # no second copy of the weights during the steps
        return [result.text for result in results]
