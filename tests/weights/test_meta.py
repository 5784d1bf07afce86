"""Meta's own files: Meta's logits from them, files that torch reads, and one-line refusals of every broken one."""

import dataclasses
import json
import pickletools
import shutil
import struct
import zipfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from golden import make_meta
from helpers.errors import refusal
from llama_jax import model
from llama_jax.config import SIZES
from llama_jax.errors import ConfigError
from llama_jax.weights import load, name_table
from llama_jax.weights.formats import meta, torch_file
from llama_jax.weights.tensor import of_array
from llama_jax.weights.validate import match_tensors

GOLDEN = make_meta.HERE
CASES = list(make_meta.CASES)
SMALL = dataclasses.replace(
    SIZES["llama3.1-8b"], vocab_size=40, embed_dim=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6, ffn_dim=72
)
BF16 = np.dtype(ml_dtypes.bfloat16)
_Q, _NORM = "layers.1.attention.wq.weight", "layers.0.ffn_norm.weight"


def leaves_of(folder):
    config, entries = meta.open_folder(folder)
    return match_tensors(entries, config, format="meta", source=str(folder))


def cast(leaves, dtype):
    return {path: leaf.cast(np.dtype(dtype), str(path)) for path, leaf in leaves.items()}


def random_leaves(config):
    """Weights of our own shapes, by path, in float32."""
    draw = np.random.RandomState(0)
    arrays = {w.path: draw.standard_normal(w.shape).astype(np.float32) for w in name_table.weights(config, "meta")}
    return {path: of_array(lambda a=a: a, a.dtype, a.shape) for path, a in arrays.items()}


def copy_of(case, folder):
    return shutil.copytree(GOLDEN / case, folder)


def change(folder, **settings):
    """Change params.json; None takes a setting out."""
    path = folder / "params.json"
    changed = json.loads(path.read_text()) | settings
    path.write_text(json.dumps({key: value for key, value in changed.items() if value is not None}))


def rewrite(path, spoil):
    """Save a file again with other tensors."""
    torch_file.save_file(path.with_suffix(".new"), spoil(torch_file.open_file(path)))
    path.with_suffix(".new").replace(path)


# Against Meta's code.


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_metas_code(case):
    config, leaves = leaves_of(GOLDEN / case)
    params = load.load_leaves(leaves, config, layout=None, dtype=jnp.float32, quantize="none")
    tokens = jnp.asarray(make_meta.tokens())
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

    @jax.jit
    def logits(params):
        return model.unembed(config, params, model.forward(config, params, tokens, positions, None)[0])

    golden = np.load(GOLDEN / case / "logits.npy")
    assert np.abs(logits(params) - golden).max() / np.abs(golden).max() < 3e-6


def test_settings_and_tensors_make_the_config():
    one, tied, split, llama2 = (meta.open_folder(GOLDEN / case)[0] for case in CASES)
    assert one == dataclasses.replace(
        SIZES["llama3.1-8b"],
        **{"vocab_size": 32, "embed_dim": 16, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4},
        ffn_dim=56,
    )
    assert tied == dataclasses.replace(one, ffn_dim=64, tied_embeddings=True)
    assert split == dataclasses.replace(one, ffn_dim=48, rope_scaling=None, max_seq_len=4096)
    assert llama2 == dataclasses.replace(split, num_kv_heads=4, ffn_dim=64, rope_theta=10_000.0)


@pytest.mark.parametrize("name", list(make_meta.PUBLISHED))
def test_params_of_the_published_sizes_are_the_published_ones(name):
    published = json.loads((GOLDEN / "published.json").read_text())[name]
    assert {"use_scaled_rope": False} | meta.export_params(SIZES[name]) == published


def test_parts_of_split_tensors_are_those_of_the_whole():
    for case in ("split", "llama2"):
        for entry in meta.open_folder(GOLDEN / case)[1].values():
            part = tuple(slice(n // 3, n - 3) for n in entry.shape)
            np.testing.assert_array_equal(entry.read(part), entry.read()[part])


def test_files_in_one_split_in_any_number_are_the_same_model(tmp_path):
    """A split made here, by the shapes of fairscale's layers, against the whole."""
    config = dataclasses.replace(SMALL, num_kv_heads=4)
    leaves = random_leaves(config)
    (tmp_path / "whole").mkdir()
    meta.save_folder(tmp_path / "whole", config, cast(leaves, BF16))
    whole = {name: entry.read() for name, entry in meta.open_folder(tmp_path / "whole")[1].items()}
    columns = ("attention.wo.weight", "feed_forward.w2.weight")
    for count, embedding in ((2, 0), (4, 1), (4, 0)):
        shutil.rmtree(tmp_path / "split", ignore_errors=True)
        shutil.copytree(tmp_path / "whole", tmp_path / "split")
        for rank in range(count):
            parts = {}
            for name, array in whole.items():
                axis = embedding if "tok" in name else int(name.endswith(columns))
                part = array if array.ndim == 1 else np.split(array, count, axis)[rank]
                parts[name] = of_array(lambda part=part: part, part.dtype, part.shape)
            torch_file.save_file(tmp_path / "split" / f"consolidated.{rank:02}.pth", parts)
        again, entries = meta.open_folder(tmp_path / "split")
        assert again == config
        assert all(entries[name].read().tobytes() == array.tobytes() for name, array in whole.items())


# Saving.


@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float16), np.dtype(np.float32)], ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_saved_folder_comes_back_to_the_bit(tmp_path, dtype, tied):
    config = dataclasses.replace(SMALL, tied_embeddings=tied)
    leaves, written = random_leaves(config), []
    meta.save_folder(tmp_path, config, cast(leaves, dtype), progress=written.append)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["consolidated.00.pth", "params.json"]
    again, found = leaves_of(tmp_path)
    assert again == config
    for path, leaf in leaves.items():
        np.testing.assert_array_equal(found[path].read(), leaf.read().astype(dtype))
    assert sum(written) == config.num_params * dtype.itemsize


def test_saved_file_is_built_as_torchs_own(tmp_path):
    """By hand: torch.load(weights_only=True, mmap=True) reads such files, and Meta's model gives the same logits."""
    config, leaves = leaves_of(GOLDEN / "tied")
    meta.save_folder(tmp_path, config, cast(leaves, BF16))
    ours, theirs = (zipfile.ZipFile(f / "consolidated.00.pth") for f in (tmp_path, GOLDEN / "one"))
    assert ours.testzip() is None
    for info in ours.infolist():
        assert info.compress_type == zipfile.ZIP_STORED
        ours.fp.seek(info.header_offset + 26)
        name, extra = struct.unpack("<2H", ours.fp.read(4))
        assert (info.header_offset + 30 + name + extra) % 64 == 0
    assert ours.read("archive/byteorder") == b"little" and ours.read("archive/version") == b"3\n"

    def words(archive, top):
        operations = list(pickletools.genops(archive.read(f"{top}/data.pkl")))
        assert operations[0][1] == operations[0][0].proto == 2
        return {arg for op, arg, _ in operations if op.name == "GLOBAL"}, {op.name for op, _, _ in operations}

    names, steps = words(ours, "archive")
    their_names, their_steps = words(theirs, "consolidated.00")
    assert names == their_names
    assert steps <= their_steps | {"BININT"}
    # Tied weights are one storage, which torch gives both names.
    stored = [name for name in ours.namelist() if name.startswith("archive/data/")]
    assert len(stored) == len(name_table.weights(meta.open_folder(tmp_path)[0], "meta"))
    assert "output.weight" in torch_file.open_file(tmp_path / "consolidated.00.pth")


def test_a_copy_of_the_embedding_is_a_tie(tmp_path):
    for case in ("one", "split"):
        folder = copy_of(case, tmp_path / case)
        assert not meta.open_folder(folder)[0].tied_embeddings
        for path in folder.glob("*.pth"):
            table = torch_file.open_file(path)["tok_embeddings.weight"].read()
            rewrite(path, lambda t, c=table: t | {"output.weight": of_array(lambda: c, c.dtype, c.shape)})
        config, entries = meta.open_folder(folder)
        assert config.tied_embeddings and "output.weight" not in entries
        table[-1, -1] += 1
        rewrite(path, lambda t, c=table: t | {"output.weight": of_array(lambda: c, c.dtype, c.shape)})
        assert not meta.open_folder(folder)[0].tied_embeddings


def test_one_storage_cannot_stand_for_a_whole_model(tmp_path):
    row = np.ones((4, 5), np.float32)
    shared = of_array(lambda: row, row.dtype, row.shape)
    torch_file.save_file(tmp_path / "two.pth", {"a": shared, "b": shared})
    assert set(torch_file.open_file(tmp_path / "two.pth")) == {"a", "b"}
    large = np.ones((4000, 5), np.float32)
    shared = of_array(lambda: large, large.dtype, large.shape)
    torch_file.save_file(tmp_path / "many.pth", {str(i): shared for i in range(9)})
    with pytest.raises(ValueError, match="they share storage"):
        torch_file.open_file(tmp_path / "many.pth")


def test_a_failed_save_leaves_no_folder_that_opens(tmp_path):
    leaves = random_leaves(SMALL)

    def fails():
        raise OSError("disk full")

    leaves[("norm", "scale")] = of_array(fails, np.dtype(np.float32), (24,))
    with pytest.raises(OSError, match="disk full"):
        meta.save_folder(tmp_path, SMALL, leaves)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="complex64"):
        torch_file.save_file(tmp_path / "x.pth", {"a": of_array(fails, np.dtype(np.complex64), (2,))})


@pytest.mark.parametrize("ffn", [1, 63, 64, 65, 72, 100, 255, 256, 4097])
@pytest.mark.parametrize("dim", [2, 24, 2048])
def test_any_ffn_dim_is_expressed_exactly(dim, ffn):
    config = dataclasses.replace(SMALL, embed_dim=dim, num_heads=1, num_kv_heads=1, head_dim=dim, ffn_dim=ffn)
    settings = meta.export_params(config)
    hidden = int(2 * (4 * dim) / 3)  # FeedForward in Meta's model.py
    hidden = int(settings.get("ffn_dim_multiplier", 1) * hidden)
    assert -(-hidden // settings["multiple_of"]) * settings["multiple_of"] == ffn


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (dataclasses.replace(SMALL, head_dim=8), ("head_dim=8", "6 wide")),
        (dataclasses.replace(SMALL, rope_scaling=SIZES["llama3.2-1b"].rope_scaling), ("rope_scaling", "factor=32")),
        (dataclasses.replace(SIZES["llama3.2-1b"], rope_scaling=SMALL.rope_scaling), ("rope_scaling", "factor=32")),
    ],
)
def test_what_metas_code_cannot_express_is_refused_by_field(config, words):
    with pytest.raises(ConfigError) as error:
        meta.export_params(config)
    text = refusal(error)
    assert all(word in text for word in (*words, "Hugging Face")), text


# Folders that are not whole or not of one model.


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"dim": None}, ("lacks dim",)),
        ({"norm_eps": None}, ("lacks norm_eps",)),
        ({"quantization_args": {"scheme": "int4"}}, ("quantization_args", "another kind of model")),
        ({"lora_args": {"rank": 16}}, ("lora_args",)),
        ({"vision_chunk_size": 448}, ("vision_chunk_size=448",)),
        ({"moe_args": {}}, ("moe_args",)),
        ({"rope_thata": 1e6}, ("rope_thata", "did you mean 'rope_theta'")),
        ({"dim": 17}, ("dim=17", "n_heads=4")),
        ({"dim": 10**400}, ("dim", "whole number")),
        ({"dim": "16"}, ("dim", "'16'")),
        ({"dim": True}, ("dim", "True")),
        ({"dim": 32}, ("tok_embeddings", "(32, 16)", "(32, 32)")),
        ({"n_layers": 3}, ("n_layers=3", "2 layers")),
        ({"n_layers": 1 << 20}, ("num_layers", "4,096", "1048576")),
        ({"n_layers": 1 << 62}, ("n_layers", "whole number")),
        ({"n_heads": 8, "n_kv_heads": 3}, ("num_kv_heads=3",)),
        ({"n_kv_heads": 4}, ("attention.wk", "(8, 16)", "(16, 16)")),
        ({"vocab_size": 31}, ("tok_embeddings", "(32, 16)", "(31, 16)")),
        ({"vocab_size": 0}, ("vocab_size", "0")),
        ({"multiple_of": 0}, ("multiple_of", "0")),
        ({"multiple_of": 64}, ("w1", "(56, 16)", "(64, 16)")),
        ({"ffn_dim_multiplier": 1e300}, ("ffn_dim_multiplier",)),
        ({"norm_eps": -1e-5}, ("norm_eps",)),
        ({"norm_eps": float("nan")}, ("norm_eps", "nan")),
        ({"rope_theta": None}, ("lacks rope_theta",)),
        ({"use_scaled_rope": "yes"}, ("use_scaled_rope", "'yes'")),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_refused_by_name(tmp_path, settings, words):
    folder = copy_of("one", tmp_path / "one")
    change(folder, **settings)
    with pytest.raises(ValueError) as error:
        meta.open_folder(folder)
    text = refusal(error)
    assert all(word in text for word in words), text


def test_settings_that_change_nothing_are_passed_over(tmp_path):
    folder = copy_of("one", tmp_path / "one")
    change(folder, max_seq_len=2048, max_batch_size=4, model_parallel_size=1, vision_chunk_size=-1)
    text = (folder / "params.json").read_text()
    (folder / "params.json").write_text(text.replace("{", '{"lora_args": null, "use_qk_norm": false, "window": 0, ', 1))
    assert meta.open_folder(folder)[0] == meta.open_folder(GOLDEN / "one")[0]


def _without(name):
    return lambda tensors: {key: entry for key, entry in tensors.items() if key != name}


def _shorter(name):
    def spoil(tensors):
        array = tensors[name].read()[:-1]
        return tensors | {name: of_array(lambda: array, array.dtype, array.shape)}

    return spoil


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: (f / "params.json").unlink(), ("params.json", "no such file")),
        (lambda f: [p.unlink() for p in f.glob("*.pth")], ("no consolidated.00.pth",)),
        (lambda f: (f / "consolidated.00.pth").unlink(), ("consolidated.00.pth is missing",)),
        (lambda f: (f / "consolidated.01.pth").rename(f / "consolidated.07.pth"), ("consolidated.01.pth is missing",)),
        (lambda f: (f / "consolidated.01.pth").unlink(), ("attention.wq", "(8, 16)", "(16, 16)", "missing")),
        (lambda f: rewrite(f / "consolidated.01.pth", _without(_Q)), ("consolidated.01.pth: no tensor", _Q)),
        (lambda f: rewrite(f / "consolidated.00.pth", _without(_NORM)), ("consolidated.00.pth: no tensor", _NORM)),
        (lambda f: rewrite(f / "consolidated.01.pth", _shorter(_Q)), ("consolidated.01.pth", _Q, "(7, 16)", "(8, 16)")),
        (
            lambda f: rewrite(f / "consolidated.01.pth", lambda t: t | {_Q: t[_Q].cast(np.dtype(BF16), _Q)}),
            ("consolidated.01.pth", _Q, "bfloat16", "float32"),
        ),
        (
            lambda f: [rewrite(f / f"consolidated.0{i}.pth", _without("tok_embeddings.weight")) for i in range(2)],
            ("no matrix 'tok_embeddings.weight'",),
        ),
        (lambda f: (f / "consolidated.01.pth").write_bytes(b""), ("consolidated.01.pth", "not a file of torch.save")),
    ],
)
def test_files_that_do_not_fit_each_other_are_refused(tmp_path, spoil, words):
    folder = copy_of("split", tmp_path / "split")
    spoil(folder)
    with pytest.raises(ValueError) as error:
        meta.open_folder(folder)
    text = refusal(error)
    assert all(word in text for word in words), text


@pytest.mark.parametrize("files", [(0,), (1,), (0, 1)], ids=str)
def test_frequencies_in_any_of_the_files_are_ignored(tmp_path, files):
    """Some of Meta's downloads have the buffer in one file only, or of different lengths."""
    folder = copy_of("split", tmp_path / "split")
    for i in files:
        buffer = np.ones(3 + i, np.float32)
        buffer = of_array(lambda buffer=buffer: buffer, buffer.dtype, buffer.shape)
        rewrite(folder / f"consolidated.0{i}.pth", lambda t, buffer=buffer: t | {"rope.freqs": buffer})
    config, leaves = leaves_of(folder)
    expected, original = leaves_of(GOLDEN / "split")
    assert config == expected and leaves.keys() == original.keys()
    assert all(np.array_equal(leaf.read(), original[path].read()) for path, leaf in leaves.items())


def test_missing_and_foreign_tensors_are_left_to_the_loader_to_name(tmp_path):
    for spoil, word in ((_without(_Q), _Q), (lambda t: t | {"layers.0.attention.wq.bias": t[_NORM]}, "wq.bias")):
        folder = copy_of("one", tmp_path / word)
        rewrite(folder / "consolidated.00.pth", spoil)
        with pytest.raises(ValueError, match=word):
            leaves_of(folder)
