"""Comparison of two models on the same prompts: both answer, a judge compares the answers, and the rates are plotted.

A folder keeps every answer and verdict as soon as it exists, as a line of JSON, so that a repeated call continues where
the last one ended: `answers.jsonl`, `verdicts.jsonl` (of all judges), `settings.json`. Each call ends by writing the
results of its judge so far: `comparison.jsonl` (prompts, answers, verdicts), `summary.json` and `comparison.png`.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_jax.errors import ConfigError, checked_keywords
from llama_jax.eval import judges, plot
from llama_jax.eval.intervals import Tally, tally
from llama_jax.eval.judges import Case, Judge, Prompt
from llama_jax.infer import inputs
from llama_jax.infer.load import load
from llama_jax.progress import progress_bar
from llama_jax.text.tokenizer import require_tokenizer
from llama_jax.weights.formats import peft
from llama_jax.weights.open import open_source

if TYPE_CHECKING:
    from llama_jax.infer.llama import Llama

_JUDGE_TOKENS = 512
_BATCHES = 4  # batches of answers between two writes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """The two models of a comparison and their settings.

    Attributes:
        model_a, model_b: the models, as `llama_jax.load` takes them.
        adapter_a, adapter_b: the folder of a LoRA adapter for each, or None.
        chat: put a prompt that is a text as a user's message, instead of continuing the text.
        max_new_tokens: the most tokens of an answer.
        temperature: 0 is greedy; None takes all sampling settings from each model.
        seed: both models answer prompt i with seed + i.
        dtype, quantize: arguments of `llama_jax.load`.
        chat_format: likewise, of both models.
    """

    model_a: str
    model_b: str
    adapter_a: str | None = None
    adapter_b: str | None = None
    chat: bool = False
    max_new_tokens: int = 256
    temperature: float | None = None
    seed: int = 0
    dtype: str | None = None
    quantize: str | None = None
    chat_format: str = "auto"

    @property
    def both(self) -> tuple[tuple[str, str | None], tuple[str, str | None]]:
        """The pairs (model, adapter) of side A and of side B."""
        return (self.model_a, self.adapter_a), (self.model_b, self.adapter_b)

    @property
    def names(self) -> tuple[str, str]:
        """Names of the two models: the last part of each path, with as many parts before it as distinguish the two."""
        models = [(Path(model).parts, f" + {Path(adapter).name}" if adapter else "") for model, adapter in self.both]
        for size in range(1, max(len(parts) for parts, _ in models) + 1):
            name_a, name_b = ("/".join(parts[-size:]) + adapter for parts, adapter in models)
            if name_a != name_b:
                return name_a, name_b
        return f"{name_a} (A)", f"{name_b} (B)"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The results of a comparison.

    Attributes:
        tallies: the rates, overall first, then by category.
        judged: number of prompts with a verdict.
        total: number of prompts.
        unread: number of answers of a judge model without a verdict; they count as ties.
        folder: the folder that keeps everything.
        picture: file of the bars, or None before the first verdict.
    """

    tallies: list[Tally]
    judged: int
    total: int
    unread: int
    folder: Path
    picture: Path | None


@checked_keywords
def compare(
    asked: Asked,
    prompts: Sequence[Prompt],
    *,
    judge: str,
    out: str | os.PathLike[str],
    judge_function: str | None = None,
    judge_model: str | None = None,
    batch_size: int = 8,
    mesh: Mapping[str, int] | None = None,
    progress: bool = True,
) -> Comparison:
    """Generates the answers of two models, and lets a judge compare them. Only one model is in memory at a time.

    Args:
        asked: the models and their settings.
        prompts: the prompts, as `read_prompts` returns them.
        judge: one of judges.KINDS.
        out: the folder that keeps everything. A comparison of the same models and prompts in it is continued.
        judge_function: "FILE.py:NAME" for "function"; see `judges.by_function`.
        judge_model: an instruct model for "model", as `llama_jax.load` takes it.
        batch_size: answers that run together.
        mesh: the mesh of all models, as `llama_jax.load` takes it.
        progress: bars on standard error.

    Raises:
        ConfigError: settings that cannot work, or a folder of another comparison. If possible, it is raised before a
            model is loaded.
    """
    _check(asked, prompts, judge, judge_function, judge_model)
    inputs.as_whole(batch_size, "batch_size")
    inputs.as_sampling({"temperature": asked.temperature}, inputs.SamplingParams())

    by_function = judges.by_function(judge_function) if judge_function is not None else None
    folder = _open(Path(out), asked, prompts)

    opened: dict[str, Any] = {"mesh": mesh, "dtype": asked.dtype, "quantize": asked.quantize}
    answers = {
        side: _answers(folder, side, asked, prompts, opened, batch_size=batch_size, progress=progress) for side in "ab"
    }
    cases = [Case(i, prompt, answers["a"][i], answers["b"][i]) for i, prompt in enumerate(prompts)]
    identity = _identity(judge, judge_function, judge_model, asked.seed)
    verdicts = {line["number"]: line for line in _lines(folder / "verdicts.jsonl") if line["judge"] == identity}
    pending = [case for case in cases if case.number not in verdicts]
    if pending:
        if judge_model is not None:
            decide: Judge = judges.by_model(_asker(load(judge_model, **opened), batch_size), batch_size=batch_size)
        elif judge == "person":
            decide = judges.by_person(seed=asked.seed, total=len(cases))
        else:
            decide = by_function or judges.exact
        verdicts |= _judged(folder, identity, decide, pending, progress=progress and judge == "model")
    return _report(folder, asked, cases, verdicts, judge)


def _judged(
    folder: Path, identity: str, decide: Judge, pending: Sequence[Case], *, progress: bool
) -> dict[int, dict[str, Any]]:
    """The verdicts on pending cases by case number. Each is written to the folder at once. The judge may stop."""
    verdicts = {}
    bar = progress_bar(len(pending), "judging", unit="row", shown=progress)
    with bar, open(folder / "verdicts.jsonl", "a") as file:
        for verdict in decide(pending):
            line = {"judge": identity, **dataclasses.asdict(verdict)}
            _append(file, line)
            verdicts[verdict.number] = line
            bar.update(1)
    return verdicts


def read_prompts(path: str | os.PathLike[str]) -> list[Prompt]:
    """The prompts of a JSON-lines file.

    A line is a text, or an object with "prompt" (a text) or "messages" (a dialog that ends with a user), and perhaps
    "reference" (the right answer, or a list of right ones) and "category". Other keys are ignored.

    Raises:
        ConfigError: a line has another form. The message names the line and the allowed forms.
    """
    prompts = []
    data = Path(path).read_bytes()
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            value = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{place} is not a line of JSON: {error}") from None
        prompts.append(_prompt({"prompt": value} if isinstance(value, str) else value, place))
    if not prompts:
        raise ConfigError(f'{path} holds no prompt: give lines such as {{"prompt": "The capital of France is"}}')
    return prompts


def _prompt(value: Any, place: str) -> Prompt:
    if not isinstance(value, dict) or ("prompt" in value) == ("messages" in value):
        raise ConfigError(f'{place} must be a text, or an object with either "prompt" or "messages"')
    asked: Any = value.get("prompt", value.get("messages"))
    if "prompt" in value and not (isinstance(asked, str) and asked):
        raise ConfigError(f'{place}: "prompt" must be a text that is not empty')
    if "messages" in value and not (isinstance(asked, list) and asked and all(isinstance(m, dict) for m in asked)):
        raise ConfigError(f'{place}: "messages" must be a list such as [{{"role": "user", "content": "Hello"}}]')
    if "messages" in value and asked[-1].get("role") == "assistant":
        raise ConfigError(f'{place}: "messages" must end with a message of the user, and ends with the assistant')
    reference, category = value.get("reference"), value.get("category")
    several = isinstance(reference, list) and reference and all(isinstance(r, str) for r in reference)
    if not (reference is None or isinstance(reference, str) or several):
        raise ConfigError(f'{place}: "reference" must be a text or a list of texts')
    if not (category is None or (isinstance(category, str) and category)):
        raise ConfigError(f'{place}: "category" must be a text')
    return Prompt(place, asked, reference, category)


def _check(asked: Asked, prompts: Sequence[Prompt], judge: str, function: str | None, model: str | None) -> None:
    if judge not in judges.KINDS:
        raise ConfigError(f"judge must be one of {', '.join(judges.KINDS)}, got {judge!r}")
    for kind, flag, given in (("function", "--judge_function", function), ("model", "--judge_model", model)):
        if (judge == kind) != (given is not None):
            raise ConfigError(f"{flag} {'is missing: it goes' if given is None else 'goes'} with --judge {kind}")
    if judge == "exact":
        without = [prompt.place for prompt in prompts if prompt.reference is None]
        if without:
            raise ConfigError(f'{without[0]} has no "reference", which --judge exact compares answers with')
    inputs.as_whole(asked.max_new_tokens, "max_new_tokens")


def _open(folder: Path, asked: Asked, prompts: Sequence[Prompt]) -> Path:
    """The folder with its settings written. A folder of another comparison raises a ConfigError."""
    listed = json.dumps([dataclasses.astuple(prompt)[1:] for prompt in prompts], sort_keys=True)
    mine = {
        **dataclasses.asdict(asked),
        **{f"identity_{side}": _model_identity(*names) for side, names in zip("ab", asked.both, strict=True)},
        "prompts": len(prompts),
        "prompts_sha256": hashlib.sha256(listed.encode()).hexdigest(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "settings.json"
    if not (folder / "answers.jsonl").exists():  # no answer yet that could be lost
        if any(other != path for other in folder.iterdir()):
            raise ConfigError(f"{folder} is not empty, and holds no comparison: name another folder with --out")
        path.write_text(json.dumps(mine, indent=2) + "\n")
        return folder
    try:
        there = json.loads(path.read_text())
        changed = [key for key in mine if there.get(key) != mine[key]]
    except (ValueError, AttributeError):
        raise ConfigError(f"{path} is damaged: name another folder with --out") from None
    if changed:
        key = changed[0]
        if key.startswith("identity"):
            name = asked.both["ab".index(key[-1])][0]
            raise ConfigError(f"{folder} has answers of an earlier version of {name}: name another folder with --out")
        raise ConfigError(
            f"{folder} holds another comparison: its {key} is {there.get(key)!r}, and now {mine[key]!r}; name another "
            "folder with --out"
        )
    return folder


def _answers(
    folder: Path,
    side: str,
    asked: Asked,
    prompts: Sequence[Prompt],
    opened: Mapping[str, Any],
    *,
    batch_size: int,
    progress: bool,
) -> list[str]:
    """The answers of one model in the order of the prompts. Missing ones are generated, and the model is freed."""
    path = folder / "answers.jsonl"
    there = {line["number"]: line["text"] for line in _lines(path) if line["model"] == side}
    todo = [i for i in range(len(prompts)) if i not in there]
    if todo:
        model, adapter = asked.both["ab".index(side)]
        llama = load(model, adapters=adapter, chat_format=asked.chat_format, **opened)
        dialogs = asked.chat or any(not isinstance(prompts[i].asked, str) for i in todo)
        stops = llama.chat_stop_tokens if dialogs else llama.stop_tokens
        ids = {i: _ids(llama, prompts[i], asked) for i in todo}  # all prompts are checked before the first is answered
        with (
            progress_bar(len(todo), f"answers of {side.upper()}", unit="row", shown=progress) as bar,
            open(path, "a") as file,
        ):
            for start in range(0, len(todo), _BATCHES * batch_size):
                part = todo[start : start + _BATCHES * batch_size]
                results = llama.generate(
                    [ids[i] for i in part],
                    stop_tokens=stops,
                    max_new_tokens=asked.max_new_tokens,
                    temperature=asked.temperature,
                    seed=[asked.seed + i for i in part],
                    batch_size=batch_size,
                    progress=False,
                )
                for i, result in zip(part, results, strict=True):
                    there[i] = result.text
                    _append(file, {"number": i, "model": side, "text": result.text, "finish": result.finish_reason})
                bar.update(len(part))
        del llama
        gc.collect()  # compiled functions hold the weights in reference cycles
    return [there[i] for i in range(len(prompts))]


def _ids(llama: Llama, prompt: Prompt, asked: Asked) -> list[int]:
    tokenizer = require_tokenizer(llama.tokenizer, "a comparison")
    messages = prompt.asked
    if isinstance(messages, str) and asked.chat:
        messages = [{"role": "user", "content": messages}]
    try:
        if isinstance(messages, str):
            ids = tokenizer.encode(messages, bos=True)
        else:
            ids = llama.encode_dialog(messages)
    except ValueError as error:
        raise ConfigError(f"{prompt.place}: {error}") from None
    _check_room(llama, ids, asked.max_new_tokens, prompt.place)
    return ids


def _check_room(llama: Llama, ids: Sequence[int], new: int, place: str) -> None:
    limit = llama.config.max_seq_len
    if len(ids) + new > limit:
        raise ConfigError(
            f"{place} has {len(ids):,} tokens, and with {new:,} new ones more than the model's max_seq_len={limit:,}: "
            "shorten it, or lower --max_new_tokens"
        )


def _asker(llama: Llama, batch_size: int) -> Callable[[list[str]], list[str]]:
    """The function that asks a judge model: each question is the first message of a dialog, decoded greedily."""

    def ask(questions: list[str]) -> list[str]:
        ids = [llama.encode_dialog([{"role": "user", "content": text}]) for text in questions]
        for text in ids:
            _check_room(llama, text, _JUDGE_TOKENS, "a question to the judge, with both answers,")
        results = llama.generate(
            ids,
            max_new_tokens=_JUDGE_TOKENS,
            temperature=0.0,
            batch_size=batch_size,
            progress=False,
            stop_tokens=llama.chat_stop_tokens,
        )
        return [result.text for result in results]

    return ask


def _identity(judge: str, function: str | None, model: str | None, seed: int) -> str:
    """The key of a judge's verdicts. Another judge, or a changed function, has another key and starts again."""
    if function is not None:
        file = function.rpartition(":")[0]
        return f"function {function} {hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]}"
    return f"model {model} {_model_identity(model, None)[:16]}" if model is not None else judge


def _model_identity(model: str, adapter: str | None) -> str:
    """A hash of a model and its adapter, since the files of a path may change."""
    source = open_source(model)
    digest = hashlib.sha256(source.identity().encode())
    if adapter:
        opened = peft.open_adapter(adapter, source.config)
        digest.update(repr([(path, rows.ids) for path, rows in opened.rows.items()]).encode())
        for path, tensor in opened.tensors():
            digest.update(repr(path).encode() + tensor.read().tobytes())
    return digest.hexdigest()


def _report(folder: Path, asked: Asked, cases: Sequence[Case], verdicts: Mapping[int, Any], judge: str) -> Comparison:
    judged = [case for case in cases if case.number in verdicts]
    tallies = tally((case.prompt.category, verdicts[case.number]["verdict"]) for case in judged)
    unread = sum(None in verdicts[case.number]["notes"].get("heard", ()) for case in judged)
    with open(folder / "comparison.jsonl", "w") as file:
        for case in cases:
            verdict = verdicts.get(case.number, {"verdict": None, "notes": {}})
            prompt = dataclasses.asdict(case.prompt)
            _append(file, {**prompt, "a": case.a, "b": case.b, "verdict": verdict["verdict"], **verdict["notes"]})
    name_a, name_b = asked.names
    rows = [dataclasses.asdict(row) for row in tallies if row.n]
    summary = {"a": name_a, "b": name_b, "judge": judge, "judged": len(judged), "prompts": len(cases), "unread": unread}
    (folder / "summary.json").write_text(json.dumps({**summary, "tallies": rows}, indent=2) + "\n")
    drawn = None
    if judged:
        said_by = {"exact": "exact match", "function": "a function", "model": "a model", "person": "a person, blind"}
        drawn = plot.draw(tallies, folder / "comparison.png", name_a=name_a, name_b=name_b, judge=said_by[judge])
    return Comparison(tallies, len(judged), len(cases), unread, folder, drawn)


def _lines(path: Path) -> Iterator[Any]:
    """The complete lines of a file. The incomplete last line of a killed process is removed from the file."""
    if not path.exists():
        return
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(path, len(whole))
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            yield json.loads(line)
        except ValueError as error:
            raise ConfigError(
                f"{path}:{number} is damaged ({error}): delete the line, or name another folder with --out"
            ) from None


def _append(file: Any, line: Any) -> None:
    file.write(json.dumps(line, ensure_ascii=True) + "\n")
    file.flush()
