"""`infer` from outside: one process for what only a process shows, `infer.main` with a small model for the rest."""

import io
import json
import os
import subprocess
import sys

import jax
import pytest

from helpers.paths import ROOT
from helpers.tokenizers import byte_tokenizer
from llama_jax import config as configs
from llama_jax.cli import chat, commands, convert, exits, infer
from llama_jax.cli import eval as eval_command
from llama_jax.errors import ConfigError
from llama_jax.infer.llama import Llama
from llama_jax.infer.result import Result
from llama_jax.infer.sampler import Stream
from llama_jax.params import init_params


@pytest.fixture(scope="module")
def small():
    config = configs.size("tiny")
    tokenizer = byte_tokenizer()
    return Llama(config, init_params(config, jax.random.key(0)), tokenizer, stop_tokens=())


@pytest.fixture
def run(small, monkeypatch, capsys):
    monkeypatch.setattr("llama_jax.infer.load.load", lambda source, **_: small)
    monkeypatch.setattr("llama_jax.compilation_cache.enable", lambda: None)

    def run(*argv, stdin=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        try:
            status = exits.run(infer.main, ["--model", "m", *argv])
        except SystemExit as leave:  # --help and --version
            status = leave.code
        out, err = capsys.readouterr()
        return status, out, err

    return run


def test_one_prompt_streams_the_text_of_generate(run, small):
    status, out, _ = run("--prompt", "hello", "--max_new_tokens", "12", "--seed", "5", "--temperature", "0.8")
    expected = small.generate("hello", max_new_tokens=12, seed=5, temperature=0.8)
    assert (status, out) == (0, expected.text + "\n")


def test_json_is_one_object_a_prompt(run, small):
    status, out, _ = run("--prompt", "a", "--prompt", "b", "--json", "--max_new_tokens", "4", "--top_k", "3")
    rows = [json.loads(line) for line in out.splitlines()]
    expected = small.generate(["a", "b"], max_new_tokens=4, top_k=3)
    assert status == 0
    assert [(r["text"], r["tokens"]) for r in rows] == [(e.text, e.tokens) for e in expected]
    always = {"text", "tokens", "logprobs", "finish_reason", "stop", "index", "prompt_tokens", "steps", "cached_tokens"}
    assert rows[0].keys() == always | {"tokens_per_second"} and [row["index"] for row in rows] == [0, 1]
    assert rows[0]["finish_reason"] == "length" and rows[0]["tokens_per_second"] > 0


def test_prompts_come_from_lines_from_json_lines_and_from_standard_input(run, tmp_path):
    options = ("--json", "--max_new_tokens", "3", "--temperature", "0")
    plain, lines = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    plain.write_text("one\n\ntwo\n")
    lines.write_text('"one"\n{"prompt": "two"}\n')
    outs = [
        run("--prompt_file", str(plain), *options)[1],
        run("--prompt_file", str(lines), *options)[1],
        run("--prompt_file", "-", *options, stdin="one\ntwo\n")[1],
    ]
    tokens = [[json.loads(line)["tokens"] for line in out.splitlines()] for out in outs]
    assert len(tokens[0]) == 2 and tokens[0] == tokens[1] == tokens[2]
    assert run("--prompt_file", str(plain), *options[1:])[1].count("=== prompt") == 2


def test_a_command_line_of_llama_cpp_runs(run, small, tmp_path):
    (tmp_path / "p.txt").write_text("two\nlines\n")
    hardware = ["-ngl", "99", "-c", "4096", "-t", "8", "-b", "512", "-fa", "on", "--no-mmap", "--flash-attn"]
    argv = [*hardware, "-f", str(tmp_path / "p.txt"), "-n", "4", "--temp", "0", "--logit-bias", "65+2"]
    status, out, err = run(*argv)
    expected = small.generate("two\nlines", max_new_tokens=4, temperature=0, logit_bias={65: 2})
    assert (status, out) == (0, expected.text + "\n")
    assert err.startswith("ignored: -ngl (all layers run on the accelerator") and err.count("\n") == 1
    assert "-fa, --flash-attn (the fastest attention of the device is chosen)" in err
    assert run(*argv, "--quiet")[2] == ""
    assert infer.parse(["-m", "m", "-p", "b", "-l", "65+2"]).logit_bias == ["65+2"]


def test_each_line_of_json_may_have_options_of_its_own(run, small, tmp_path):
    lines = tmp_path / "prompts.jsonl"
    own = [{"temperature": 0}, {"max_new_tokens": 2}, {"banned_tokens": [1, 2]}]
    lines.write_text("\n".join(json.dumps({"prompt": "x", **each}) for each in own))
    rows = [json.loads(line) for line in run("--prompt_file", str(lines), "--json", "-n", "5")[1].splitlines()]
    expected = small.generate(["x"] * 3, overrides=own, max_new_tokens=5)
    assert [row["tokens"] for row in rows] == [result.tokens for result in expected]
    lines.write_text('{"prompt": "x", "temprature": 1}')
    error = "prompt 0: unknown option 'temprature'; did you mean 'temperature'"
    assert error in run("--prompt_file", str(lines))[2]


def test_a_line_of_json_may_have_a_seed_and_an_id_that_comes_back(run, small, tmp_path):
    lines = tmp_path / "prompts.jsonl"
    lines.write_text('\ufeff{"prompt": "x", "seed": 9, "id": "q7"}\n"x"\n', encoding="utf-8")
    rows = [json.loads(line) for line in run("--prompt_file", str(lines), "--json", "-n", "5")[1].splitlines()]
    assert rows[0]["id"] == "q7" and "id" not in rows[1]
    assert [row["tokens"] for row in rows] == [small.generate("x", max_new_tokens=5, seed=n).tokens for n in (9, 1)]


def test_flags_of_a_continuation_are_the_options_of_generate(run, small, tmp_path):
    (tmp_path / "schema.json").write_text('{"enum": [12, 34]}')
    flags = ["--temp", "1.1", "--presence-penalty", "0.5", "--logit_bias", "65=2", "--logit_bias", '{"66": -1}']
    flags += ["--min_tokens", "2", "--top_logprobs", "2", "--prompt_logprobs", "0", "--typical", "0.9", "--ignore_eos"]
    how = {"temperature": 1.1, "presence_penalty": 0.5, "logit_bias": {65: 2, 66: -1}, "min_tokens": 2}
    how |= {"top_logprobs": 2, "prompt_logprobs": 0, "typical_p": 0.9, "ignore_eos": True}
    (row,) = (json.loads(line) for line in run("--prompt", "abc", "-n", "4", "--json", *flags)[1].splitlines())
    expected = small.generate("abc", max_new_tokens=4, **how)
    assert row["tokens"] == expected.tokens and row["prompt_logprobs"] == expected.prompt_logprobs
    assert [[tuple(pair) for pair in best] for best in row["top_logprobs"]] == expected.top_logprobs
    several = run("--prompt", "abc", "-n", "4", "--num_samples", "3")[1]
    texts = [result.text for result in small.generate("abc", max_new_tokens=4, n=3)]
    assert several == "".join(f"--- {text}\n" for text in texts)


def test_a_dialog_in_a_file_is_answered(run, small, tmp_path):
    messages = [{"role": "user", "content": "hi"}]
    (tmp_path / "dialog.json").write_text(json.dumps(messages))
    _, out, _ = run("--messages", str(tmp_path / "dialog.json"), "--max_new_tokens", "6", "--temperature", "0")
    assert out == small.chat(messages, max_new_tokens=6, temperature=0).text + "\n"


def test_each_question_is_answered_alone(run, small):
    options = ("--max_new_tokens", "6", "--temperature", "0.8", "--seed", "4")
    dialogs = [[{"role": "user", "content": text}] for text in ("hi", "and you?")]
    how = {"max_new_tokens": 6, "temperature": 0.8}
    first, second = (small.chat(dialog, seed=4 + i, **how) for i, dialog in enumerate(dialogs))
    assert run("--ask", "hi", *options)[1] == f"{first.text}\n"
    asked = ("--ask", "hi", "--ask", "and you?", *options)
    assert run(*asked)[1] == f"> hi\n{first.text}\n> and you?\n{second.text}\n"
    assert [json.loads(line)["tokens"] for line in run(*asked, "--json")[1].splitlines()] == [
        first.tokens,
        second.tokens,
    ]
    dialog = [{"role": "system", "content": "Be brief."}, *dialogs[0]]
    assert run("--ask", "hi", "--system", "Be brief.", *options)[1] == small.chat(dialog, seed=4, **how).text + "\n"


def test_chat_remembers_until_reset_and_leaves_at_quit(run, small):
    lines = "hi\nagain\n/reset\nhi\n/rest\n/quit\nnever\n"
    status, out, err = run("--chat", "--max_new_tokens", "5", "--temperature", "0", stdin=lines)
    first = small.chat([{"role": "user", "content": "hi"}], max_new_tokens=5, temperature=0).text
    dialog = [("user", "hi"), ("assistant", first), ("user", "again")]
    messages = [{"role": role, "content": content} for role, content in dialog]
    second = small.chat(messages, max_new_tokens=5, temperature=0).text
    assert status == 0 and "unknown command /rest" in err
    assert out == f"> {first}\n> {second}\n> > {first}\n> > "


def test_the_answers_of_a_chat_keep_their_ids_for_the_next_turn(small, monkeypatch, tmp_path, capsys):
    said = Result(text="hi", tokens=[104, 105], logprobs=[0.0] * 2, finish_reason="stop")
    monkeypatch.setattr(small, "stream_chat", lambda *_, **__: Stream(iter(["h", "i"]), lambda: said), raising=False)
    dialog = chat.Chat(small, None, {})
    dialog._ask("hello")
    assert dialog.messages[-1]["tokens"] == said.tokens and dialog.messages[-1]["content"] == "hi"
    assert small.encode_dialog([*dialog.messages, {"role": "user", "content": "x"}])
    dialog._command(f"/save {tmp_path / 'dialog.json'}")
    assert "tokens" not in json.loads((tmp_path / "dialog.json").read_text())[-1]
    assert capsys.readouterr().out == "hi\n"


def test_an_answer_that_a_stop_string_ended_is_remembered_without_it(small, monkeypatch):
    said = Result(text="h", tokens=[104, 105], logprobs=[0.0] * 2, finish_reason="stop", stop="i")
    monkeypatch.setattr(small, "stream_chat", lambda *_, **__: Stream(iter(["h"]), lambda: said), raising=False)
    dialog = chat.Chat(small, None, {})
    dialog._ask("hello")
    assert dialog.messages[-1] == {"role": "assistant", "content": "h"}


def test_control_c_stops_an_answer_and_keeps_the_dialog(run, small, monkeypatch):
    asked = []

    def pieces():
        yield "par"
        raise KeyboardInterrupt

    def interrupted(messages, **_):
        asked.append([m["content"] for m in messages])
        return Stream(pieces(), lambda: None)

    monkeypatch.setattr(small, "stream_chat", interrupted, raising=False)
    status, out, _ = run("--chat", stdin="hi\nmore\n")
    assert status == 0 and out.startswith("> par\n> par\n")
    assert asked == [["hi"], ["hi", "par", "more"]]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--prompt", "a", "--temprature", "1"], "unknown argument '--temprature'; did you mean '--temperature'?"),
        (["--prompt", "a", "--max_new_token=3"], "did you mean '--max_new_tokens'?"),
        (["--prompt", "a", "--server"], "--server is not a flag of llama-jax infer: there is no server"),
        (["--prompt", "a", "-dev", "none"], "-dev is not a flag of llama-jax infer: --mesh chooses devices"),
        (["--prompt", "a", "--in-prefix", "b"], "dialogs are written by the model's chat template"),
        (["--prompt", "a", "-c"], "argument -c: expected one argument"),
        (["--prompt", "a", "-c", "-n", "3"], "argument -c: expected one argument"),
        (["--prompt", "--temp", "0"], "argument --prompt: expected one argument"),
        (["--prompt", "a", "--max-length", "9"], "write --max_new_tokens, which does not count the prompt"),
        (["--prompt", "a", "--no-repeat-ngram-size", "2"], "sampling is by --temperature"),
        (["--prompt", "a", "--top-n-sigma", "2"], "sampling is by --temperature"),
        (["--prompt", "a", "b.gguf"], "unexpected argument 'b.gguf': write --model MODEL"),
        (["--prompt", "a", "--stop", ""], "--stop is empty"),
        (["--prompt", "a", "--logit_bias", "x"], "--logit_bias must be ID=X or a JSON object"),
        (["--prompt", "a", "--logit_bias", "900=1"], "the sampling settings name token 900"),
        (["--prompt", "a", "--regex", "("], "constrained decoding needs a stop token"),
        (["--prompt", "a", "--json_schema", "{"], "json_schema is not JSON"),
        (["--prompt", "a", "--json_schema", "missing.json"], "missing.json: no such file"),
        (["--prompt", "a", "--json_schema", ""], "--json_schema is empty"),
        (["--prompt", "a", "--json_schema", "[]"], "json_schema must be a JSON schema"),
        (["--prompt", "a", "--speculate", "draft"], "needs a draft model"),
        (["--prompt", "a", "--best_of", "2", "--num_samples", "3"], "best_of=2 is smaller than n=3"),
        (["--prompt", "a", "--model", ""], "--model: must be the name of a file, a folder or a hub id, got ''"),
        (
            ["--prompt", "a", "--dtype", "bfloat"],
            "--dtype: must be one of float32, bfloat16, float16, got 'bfloat'; did you mean",
        ),
        (["--prompt", "a", "--seed", "9" * 5000], "--seed: must be a whole number of at least 0, got '999"),
        (["--prompt", "a", "--quiet", "--verbose"], "--quiet and --verbose exclude each other"),
        ([], "give one of --prompt"),
        (["--prompt", "a", "--chat"], "got --prompt and --chat"),
        (["--ask", "a", "--prompt", "b"], "got --prompt and --ask"),
        (["--prompt", "a", "--system", "b"], "--system goes with --ask and --chat"),
        (["--prompt", "a", "--capacity", "64"], "--capacity goes with --plan"),
        (["--chat", "--num_samples", "2"], "--num_samples and --best_of do not go with --chat"),
        (["--chat", "--json"], "--json does not go with --chat"),
        (["--prompt", "a", "--temperature", "hot"], "--temperature: must be a number of at least 0, got 'hot'"),
        (["--prompt", "a", "--temperature", "nan"], "--temperature: must be a number"),
        (["--prompt", "a", "--temperature", "-1"], "--temperature: must be a number"),
        (["--prompt", "a", "--top_p", "0"], "--top_p: must be a number from 0.000001 to 1"),
        (["--prompt", "a", "--max_new_tokens", "0"], "--max_new_tokens: must be a whole number of at least 1"),
        (["--prompt", "a", "--logit_bias", '{"1":' + "[" * 3000], "--logit_bias must be ID=X or a JSON object"),
        (["--prompt", "a", "--host", "0.0.0.0"], "there is no server"),
        (["--prompt", "a", "-n", "-1"], "-1 is no limit in llama.cpp, but here"),
        (["--ask", "a", "--tools", '[{"type": "function"'], "--tools is not JSON"),
        (["--prompt", "a", "--max_new_tokens", "999999"], "max_seq_len=131,072"),
        (["--prompt", "a", "--mesh", "tensor"], "expected AXIS=N"),
        (["--prompt", "a", "--adapter", "x", "--lora", "y"], "--adapter is given twice, and a model takes one adapter"),
        (["--prompt_file", "missing/a.txt"], "error: missing/a.txt: No such file or directory\n"),
        (["--prompt_file", str(ROOT / "requirement.txt")], "directory; did you mean 'requirements.txt'?"),
        (["--messages", "missing.json"], "missing.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_status_2(run, argv, message):
    status, out, err = run(*argv)
    assert (status, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_names_of_dtypes_are_those_of_llama_cpp_too():
    assert [convert.parse(["a", "b", "--to", "hf", "--dtype", name]).dtype for name in ("BF16", "f16", "q8")] == [
        "bfloat16", "float16", "q8_0",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="'Q4_K_M' is a type of GGUF that is not written: q8_0 and q4_0 are"):
        convert.parse(["a", "b.gguf", "--outtype", "Q4_K_M"])
    for name in ("q5_0", "TQ1_0", "mxfp4", "iq2_xxs", "q4_1"):
        with pytest.raises(ConfigError, match=f"'{name}' is a type of GGUF that is not written"):
            convert.parse(["a", "b.gguf", "--dtype", name])


def test_the_model_of_a_command_may_be_a_flag():
    converted = convert.parse(["b.gguf", "-m", "a"])
    assert (converted.source, converted.dest, converted.to) == ("a", "b.gguf", "gguf")
    measured = eval_command._perplexity_flags(["-f", "text", "--model=a"])
    assert (measured.model, measured.text) == ("a", ["text"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["perplexity"], "did you mean 'eval perplexity'?"),
        (["quantize", "a", "b"], "did you mean 'convert'?"),
        (["eval", "compare", "-m", "x"], "-m is not a flag of llama-jax eval compare: give the models without a flag"),
        (["inspect", "--model"], "argument --model: expected one argument"),
        (["-m", "x", "-p", "y"], "llama-jax takes a command before flags, e.g. llama-jax train: train, infer"),
        (["train", "quickstart"], "unexpected argument 'quickstart'; did you mean --config quickstart?"),
    ],
)
def test_commands_of_other_programs_are_answered(argv, message):
    with pytest.raises(ConfigError) as caught:
        commands.main(argv)
    assert message in str(caught.value)


def test_messages_of_an_empty_standard_input_are_named(run):
    assert "standard input is not JSON" in run("--messages", "-", stdin="")[2]


def test_a_bad_line_of_a_prompt_file_is_named(run, tmp_path):
    (tmp_path / "p.jsonl").write_text('"fine"\n{"text": 3}\n')
    assert "line 2 must be a string" in run("--prompt_file", str(tmp_path / "p.jsonl"))[2]
    (tmp_path / "p.jsonl").write_text('"fine"\n{\n')
    assert "line 2 is not JSON" in run("--prompt_file", str(tmp_path / "p.jsonl"))[2]
    (tmp_path / "empty.txt").write_text("\n")
    assert "holds no prompt" in run("--prompt_file", str(tmp_path / "empty.txt"))[2]


def test_a_missing_model_is_told_without_a_traceback():
    done = subprocess.run(
        [sys.executable, "infer.py", "--model", "llama_jaxx", "--prompt", "a"],
        cwd=ROOT,
        env={**os.environ, "LLAMA_JAX_CACHE": "off"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "did you mean 'llama_jax'" in done.stderr


def test_a_typo_is_answered_before_jax_is_imported():
    code = "import sys; from llama_jax.cli import exits, infer\nexits.run(infer.main, ['--modle', 'x'])\n"
    code += "print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n"


def test_a_reader_that_leaves_is_no_error():
    code = (
        "from llama_jax.cli import exits\n"
        "def command(argv):\n    for _ in range(99999): print('text')\n    return 0\n"
        "exits.leave(command, [])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 141


@pytest.mark.parametrize(
    "argv",
    [
        ["-p", "hello", "-n", "6", "--temp", "0.8", "-s", "5"],
        ["--prompt=hello", "--n-predict=6", "--temp=0.8", "--seed", "5"],
        ["--prompt", "hello", "--max-tokens", "6", "--temperature", "0.8", "--seed=5", "--verbose"],
        ["--prompt", "hello", "--max_new-tokens", "6", "--temp", "0.8", "--seed=5", "--quiet"],
    ],
)
def test_flags_of_other_programs_mean_the_same(run, small, argv):
    expected = small.generate("hello", max_new_tokens=6, seed=5, temperature=0.8)
    assert run(*argv)[:2] == (0, expected.text + "\n")


def test_a_value_may_begin_with_a_hyphen(run, small):
    expected = small.generate("--x", max_new_tokens=3, temperature=0)
    assert run("-p", "--x", "-n", "3", "--temp", "0")[:2] == (0, expected.text + "\n")


@pytest.mark.parametrize("value", ["-e", "--host", "-c", "--in-prefix"])
def test_a_value_may_look_like_a_flag_of_another_program(value):
    assert infer.parse(["-m", "a", "-p", value, "-n", "3"]).prompt == [value]


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["--trust-remote-code", "True"], "no code of a model is run"),
        (["--color", "on"], "without colors"),
        (["--mlock", "FALSE"], "never mapped"),
        (["--no_perf"], "times are printed with --verbose only"),
        (["--no-display-prompt"], "one answer is printed without its prompt"),
        (["--jinja"], "--ask and --chat use the chat template"),
        (["-c", "4096"], "the KV cache is as long as"),
        (["--cpu-moe", "-ncmoe", "4"], "a Llama has no experts"),
        (["-ngl", "99"], "all layers run on the accelerator"),
    ],
)
def test_flags_that_change_no_text_are_ignored_with_their_reason(argv, reason, capsys):
    assert infer.parse(["-m", "a", "-p", "b", *argv, "-n", "3"]).max_new_tokens == 3
    err = capsys.readouterr().err
    assert err.startswith(f"ignored: {argv[0]}") and reason in err


@pytest.mark.parametrize("argv", [["-ngl", "0"], ["--n-gpu-layers=0"]])
def test_no_layers_on_a_gpu_are_a_wish_for_the_cpu(argv, monkeypatch, capsys):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    with pytest.raises(ConfigError, match="0 cannot be ignored: set the environment variable JAX_PLATFORMS=cpu"):
        infer.parse(["-m", "a", "-p", "b", *argv])
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert infer.parse(["-m", "a", "-p", "b", *argv]).prompt == ["b"]


@pytest.mark.parametrize("flag", ["-c", "--ctx-size", "--max_seq_len", "--max-model-len", "--context"])
def test_the_context_of_other_programs_is_that_of_a_measurement(flag):
    for parse in (eval_command._perplexity_flags, eval_command._quantization_flags):
        assert parse(["a", "-f", "text", flag, "64"]).context == 64
    if flag != "--context":
        assert eval_command._harness_flags(["a", "--tasks", "t", flag, "64"]).max_length == 64


def test_flags_that_a_command_does_not_have_are_not_suggested():
    with pytest.raises(ConfigError) as caught:
        eval_command._quantization_flags(["a", "--text", "b", "--lore", "c"])
    assert "unknown argument '--lore'" in str(caught.value) and "adapter" not in str(caught.value)


def test_json_that_is_nested_deeply_is_refused_in_one_line(run, tmp_path):
    deep = tmp_path / "deep.jsonl"
    deep.write_text("[" * 200_000 + "]" * 200_000)
    for flag in ("--messages", "--prompt_file"):
        status, out, err = run(flag, str(deep))
        assert (status, out) == (2, "") and "is not JSON: it is nested too deeply" in err and err.count("\n") == 1


def test_the_commands_of_a_chat(run, small, tmp_path):
    saved = tmp_path / "dialog.json"
    lines = ["/help", "hi", "/speed", "again", "/undo", f"/save {saved}", f"/save {saved}", "/system Be brief."]
    lines += ["hi", f"/load {saved}", "again", "/undo", "/undo", "/undo", "/load nowhere.json", "/quit"]
    status, out, err = run("--chat", "--max_new_tokens", "5", "--temperature", "0", stdin="\n".join(lines))
    how = {"max_new_tokens": 5, "temperature": 0}
    first = small.chat([{"role": "user", "content": "hi"}], **how).text
    dialog = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": first}]
    second = small.chat([*dialog, {"role": "user", "content": "again"}], **how).text
    brief = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    third = small.chat(brief, **how).text
    assert status == 0 and json.loads(saved.read_text()) == dialog  # the second question was taken back
    assert out.replace("> ", "").splitlines() == [
        *first.split("\n"),
        *second.split("\n"),
        *third.split("\n"),
        *second.split("\n"),
    ]
    assert "/undo " in err and "tokens/s on" in err and f"{saved} exists: name another file" in err
    assert "there is no question to take back" in err and "nowhere.json" in err


def test_a_terminal_edits_lines_and_pastes_several_as_one_message(tmp_path, monkeypatch):
    from prompt_toolkit.application import create_app_session
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        read = chat._reader()
        keys.send_text("helo\x1b[Dl\r")  # left arrow, then the missing letter
        assert read("> ") == "hello"
        keys.send_text("\x1b[200~one\ntwo" + "x" * 6000 + "\x1b[201~\r")  # a bracketed paste
        assert read("> ") == "one\ntwo" + "x" * 6000
        keys.send_text("\x1b[A\r")  # up arrow: the message before
        assert read("> ") == "one\ntwo" + "x" * 6000
        keys.send_text("\x04")
        with pytest.raises(EOFError):
            read("> ")
    assert (tmp_path / "llama_jax" / "chat_history").stat().st_mode & 0o077 == 0
