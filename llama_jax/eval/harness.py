"""A model for EleutherAI's lm_eval, and its tasks run on it. Importing this needs `pip install lm_eval`.

from llama_jax.eval import harness_model
lm_eval.simple_evaluate(model=harness_model(llama), tasks=["arc_easy"])
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_jax.errors import ConfigError, brief, checked_keywords, nearest
from llama_jax.eval import lm_eval_requests, scoring
from llama_jax.text.chat_format import TemplateFormat
from llama_jax.text.chat_template import ChatTemplate
from llama_jax.text.tokenizer import require_tokenizer

try:
    import lm_eval
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import handle_non_serializable, make_table
except ImportError as error:
    raise ConfigError(
        f"the tasks are EleutherAI's lm_eval, which cannot be imported ({error}): pip install lm_eval"
    ) from error

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from llama_jax.infer.llama import Llama


class LlamaLM(TemplateLM):
    """A model for lm_eval. Its results equal those of lm_eval's HFLM (transformers) on the same weights in float32."""

    def __init__(
        self,
        llama: Llama,
        *,
        name: str = "llama_jax",
        max_length: int | None = None,
        batch_size: int = 8,
        seed: int = 0,
    ):
        """Wraps a model for lm_eval.

        Args:
            llama: a model with a tokenizer.
            name: name of the model in caches of requests.
            max_length: the most tokens that the model reads; all of its positions by default.
            batch_size: rows that run together.
            seed: seed of tasks that sample their texts.

        Raises:
            ConfigError: the model has no tokenizer, or fewer positions than max_length.
        """
        super().__init__()
        self.llama = llama
        self._tokenizer = require_tokenizer(llama.tokenizer, "lm_eval")
        self.name = name
        self.max_length = scoring.check_length(llama, max_length)
        self.batch_size = batch_size
        self.seed = seed

    @property
    def max_gen_toks(self) -> int:
        """The default limit of new tokens, for tasks that set none."""
        return lm_eval_requests.MAX_GEN_TOKS

    @property
    def eot_token_id(self) -> int | None:
        """The tokenizer's end-of-text id, or None."""
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The id that is put in front of a text without context."""
        return lm_eval_requests.prefix_id(self.llama)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The ids of a text; see `lm_eval_requests.encode`."""
        return lm_eval_requests.encode(self.llama, string, begin=add_special_tokens)

    def tok_decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        return lm_eval_requests.decode(self.llama, tokens) if skip_special_tokens else self._tokenizer.decode(tokens)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        answers: list[Any] = [None] * len(requests)
        pairs = [(context, continuation) for _, context, continuation in requests]
        for i, found in scoring.score(
            self.llama,
            pairs,
            max_length=self.max_length,
            batch_size=self.batch_size,
            progress=False if disable_tqdm else None,
            title="loglikelihood",
        ):
            answers[i] = (float(found.logprobs.sum(dtype="float64")), bool(found.greedy.all()))
            if requests[i][0] is not None:
                self.cache_hook.add_partial("loglikelihood", requests[i][0], answers[i])
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts of any length."""
        texts = [request.args[0] for request in requests]
        totals = lm_eval_requests.rolling(
            self.llama,
            texts,
            max_length=self.max_length,
            batch_size=self.batch_size,
            progress=False if disable_tqdm else None,
        )
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts up to their stop strings."""
        texts: list[Any] = [None] * len(requests)
        asks = [request.args for request in requests]
        for i, text in lm_eval_requests.generate_until(
            self.llama,
            asks,
            max_length=self.max_length,
            batch_size=self.batch_size,
            seed=self.seed,
            progress=False if disable_tqdm else None,
        ):
            texts[i] = text
            self.cache_hook.add_partial("generate_until", asks[i], text)
        return texts

    @property
    def tokenizer_name(self) -> str:
        """The key of caches of requests: the model's name and the fingerprint of its tokenizer."""
        return f"{self.name.replace('/', '__')}-{self._tokenizer.fingerprint[:16]}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template of the model's chat format (Jinja), by which results and caches of requests are named."""
        if chat_template is False or chat_template is None:
            return None
        if isinstance(chat_template, str):
            raise ConfigError(
                f"a model has one chat template, got the name {chat_template!r}: set apply_chat_template without a name"
            )
        return self._template().source(None)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A dialog as a text. Without a generation prompt, its last message is left open, to be continued.

        Raises:
            ConfigError: the template refuses the dialog, or cannot be used.
        """
        template = self._template()
        try:
            text = TemplateFormat(self._tokenizer, template).render(
                chat_history, add_generation_prompt=add_generation_prompt
            )
        except ValueError as error:
            raise ConfigError(str(error)) from None
        if add_generation_prompt:
            return text
        last = str(chat_history[-1]["content"])
        place = text.rfind(last.strip())
        if place < 0:
            raise ConfigError("the chat template does not write the last message as it is, so it cannot be continued")
        return text[: place + len(last if text.startswith(last, place) else last.strip())]

    def _template(self) -> ChatTemplate:
        template = self.llama.chat_format.template if self.llama.chat_format else None
        if template is None:
            raise ConfigError(
                "the model has no chat template, and its tokenizer lacks the control tokens of Llama 3's chat format: "
                "give a template with --chat_format FILE"
            )
        return template

    def get_model_info(self) -> dict[str, Any]:
        """The entries about the model in lm_eval's file of results."""
        return {"model_num_parameters": self.llama.config.num_params, "model_dtype": str(self.llama.engine.dtype)}


def harness_model(llama: Llama, **options: Any) -> LlamaLM:
    """`llama` as a model of lm_eval. Options are those of LlamaLM."""
    return LlamaLM(llama, **options)


def find_tasks(tasks: Sequence[str], include: Sequence[str] = ()) -> TaskManager:
    """lm_eval's TaskManager, with the tasks in the folders of `include` too.

    Raises:
        ConfigError: a folder does not exist, or a task is neither known nor a file. The message has the nearest name.
    """
    for folder in include:
        if not Path(folder).is_dir():
            raise ConfigError(f"--include {folder}: no such folder; give one that holds tasks as YAML files")
    manager = TaskManager(include_path=list(include) or None)
    for task in tasks:
        if not Path(task).is_file() and not manager.match_tasks([task]):
            near = difflib.get_close_matches(task, manager.all_tasks, n=1)  # of 14,000
            raise ConfigError(f"lm_eval has no task {task!r}{nearest(task, near)}")
    return manager


@checked_keywords
def evaluate(
    model: LlamaLM,
    tasks: Sequence[str],
    *,
    manager: TaskManager | None = None,
    num_fewshot: int | None = None,
    limit: float | None = None,
    apply_chat_template: bool = False,
    system: str | None = None,
    log_samples: bool = False,
) -> dict[str, Any]:
    """The results of tasks by name, file or pattern. Arguments are those of `lm_eval.simple_evaluate`."""
    if isinstance(tasks, str):
        raise ConfigError(f"tasks must be a list of names, got the string {brief(tasks)}: give [{brief(tasks)}]")
    manager = manager or find_tasks(tasks)
    known = [name for task in tasks for name in ([task] if Path(task).is_file() else manager.match_tasks([task]))]
    return lm_eval.simple_evaluate(
        model=model,
        tasks=list(dict.fromkeys(known)),
        task_manager=manager,
        num_fewshot=num_fewshot,
        batch_size=model.batch_size,
        limit=limit,
        apply_chat_template=apply_chat_template,
        system_instruction=system,
        log_samples=log_samples,
    )


def table(results: dict[str, Any]) -> str:
    """The tables that lm_eval prints."""
    parts = [make_table(results)] + ([make_table(results, "groups")] if "groups" in results else [])
    return "\n".join(parts)


def write(results: dict[str, Any], path: Path) -> None:
    """Write the results as JSON, with the samples if they were kept."""
    path.write_text(json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False) + "\n")
