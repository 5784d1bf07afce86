"""Meta's own files: Meta's logits from them, files that torch reads, and one-line refusals of every broken one."""

import dataclasses
import io
import json
import pickle
import pickletools
import shutil
import struct
import tracemalloc
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
from llama_jax.weights.formats import meta, torch_file, torch_pickle
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


# torch's files: what is read.


class Name(str):
    """module.attribute, as a GLOBAL of a pickle."""


def program(*parts):
    """A pickle, assembled here: whole numbers, text, tuples, names and None as values, bytes as they are."""

    def value(part):
        match part:
            case bytes():
                return part
            case Name():
                return f"c{part.rpartition('.')[0]}\n{part.rpartition('.')[2]}\n".encode()
            case str():
                return b"X" + struct.pack("<I", len(part.encode())) + part.encode()
            case None:
                return b"N"
            case bool():
                return b"\x88" if part else b"\x89"
            case int():
                return b"\x8a\x08" + struct.pack("<q", part)
            case tuple():
                return b"(" + b"".join(map(value, part)) + b"t"

    return b"\x80\x02" + b"".join(map(value, parts)) + b"."


FLOATS = Name("torch.FloatStorage")
REBUILD = Name("torch._utils._rebuild_tensor_v2")
EMPTY = b"ccollections\nOrderedDict\n)R"


def tensor(*, kind=FLOATS, key="0", length=6, offset=0, shape=(2, 3), strides=(3, 1), rest=(False, EMPTY)):
    """{"a": one tensor}"""
    storage = (b"(" + program("storage", kind, key, "cpu", length)[2:-1] + b"tQ",)
    return program(b"}", "a", REBUILD, (*storage, offset, shape, strides, *rest), b"R", b"s")


_STORED = {"x/data/0": np.arange(6, dtype=np.float32).tobytes()}


def archive(pickled, *, how=zipfile.ZIP_STORED, **members):
    """A torch file as bytes; `members` are more of its members, or others."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", how) as written:
        for name, data in ({"x/data.pkl": pickled} | _STORED | members).items():
            written.writestr(name, data)
    return out.getvalue()


def opened(tmp_path, data):
    path = tmp_path / "x.pth"
    path.write_bytes(data)
    return torch_file.open_file(path)


@pytest.mark.parametrize("name", list(torch_pickle.STORAGES))
def test_every_type_is_read_as_it_was_written(tmp_path, name):
    array = np.random.RandomState(0).randint(0, 2, (3, 5, 2)).astype(torch_pickle.STORAGES[name])
    tensors = {"b": array, "empty": array[:0], "scalar": array[0, 0, 0]}
    torch_file.save_file(tmp_path / "x.pth", {k: of_array(lambda a=a: a, a.dtype, a.shape) for k, a in tensors.items()})
    found = torch_file.open_file(tmp_path / "x.pth")
    assert list(found) == list(tensors)
    for name, entry in found.items():
        assert (entry.dtype, entry.shape) == (tensors[name].dtype, tensors[name].shape)
        np.testing.assert_array_equal(entry.read(), tensors[name])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, [[0, 1, 2], [3, 4, 5]]),
        ({"offset": 2, "shape": (2, 2), "strides": (2, 1)}, [[2, 3], [4, 5]]),
        ({"shape": (1, 3), "strides": (-7, 1)}, [[0, 1, 2]]),
        ({"shape": (3, 1, 2), "strides": (2, 0, 1)}, [[[0, 1]], [[2, 3]], [[4, 5]]]),
        ({"shape": (), "strides": (), "offset": 5}, 5),
        ({"shape": (0, 3), "strides": (3, 1), "offset": 6}, np.zeros((0, 3))),
        ({"shape": (3, 0), "strides": (1, 1)}, np.zeros((3, 0))),  # as torch has them
        ({"rest": (False, EMPTY, None)}, [[0, 1, 2], [3, 4, 5]]),
    ],
    ids=str,
)
def test_a_tensor_is_the_part_of_its_storage_that_the_pickle_says(tmp_path, given, expected):
    np.testing.assert_array_equal(opened(tmp_path, archive(tensor(**given)))["a"].read(), expected)


def test_a_file_of_any_pickle_protocol_is_read(tmp_path):
    for stated in range(2, 6):
        data = b"\x80" + bytes([stated]) + b"\x95" + bytes(8) + tensor()[2:]
        assert list(opened(tmp_path, archive(data))) == ["a"]
    new = tensor().replace(FLOATS_AS_GLOBAL, b"\x8c\x05torch\x94\x8c\x0cFloatStorage\x94\x93\x94")
    assert new != tensor()
    assert list(opened(tmp_path, archive(new))) == ["a"]


FLOATS_AS_GLOBAL = b"ctorch\nFloatStorage\n"


def test_sizes_in_64_bits_are_read(tmp_path):
    """As torch writes them from 4 GB on."""
    data = archive(tensor())
    end = data.rindex(b"PK\5\6")
    count, size, start = struct.unpack("<HII", data[end + 10 : end + 20])
    wide = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, start)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, end, 1)
    last = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 65535, 65535, 2**32 - 1, 2**32 - 1, 0)
    np.testing.assert_array_equal(
        opened(tmp_path, data[:end] + wide + locator + last)["a"].read().reshape(-1), range(6)
    )
    torch_file.save_file(tmp_path / "wide.pth", opened(tmp_path, data))
    with open(tmp_path / "wide.pth", "rb") as file:  # the writer has them in every local header
        assert file.read(30)[18:26] == b"\xff" * 8


# torch's files: what is refused.


class Reduces:
    """Python's own pickler makes this a call."""

    def __init__(self, function, *arguments):
        self.how = function, arguments

    def __reduce__(self):
        return self.how


def _system():
    import os

    return os.system


_COMMAND = "exit 1"
HOSTILE = {
    **{f"reduce, protocol {p}": (pickle.dumps(Reduces(_system(), _COMMAND), p), "system") for p in range(6)},
    "nested in a dict": (pickle.dumps({"a": [Reduces(_system(), _COMMAND)]}, 2), "posix.system"),
    "eval": (pickle.dumps({"a": Reduces(eval, "1")}, 2), "eval"),
    "getattr": (pickle.dumps({"a": Reduces(getattr, "", "format")}, 4), "getattr"),
    "import of a submodule": (program(Name("torch.serialization.load"), b")R"), "torch.serialization.load"),
    "a name within a known one": (b"\x80\x04\x8c\x05torch\x8c\x10FloatStorage.mro\x93.", "torch.FloatStorage.mro"),
    "a name that is long": (b"\x80\x02c" + b"a" * 300_000 + b"\nb\n.", "aaa..."),
    "a name with a line feed": (b"\x80\x04\x8c\x03o\ns\x8c\x06system\x93.", "o\\ns.system"),
    "a name of other things": (program(b"}}\x93"), "?"),
    "a storage is called": (program(FLOATS, b")R"), "torch.FloatStorage"),
    "a dict is made of arguments": (program(Name("collections.OrderedDict"), ("a",), b"R"), "OrderedDict"),
    "a tensor is called": (tensor()[:-2] + b")R.", "not a function"),
    "a text is called": (program("os.system", b")R"), "not a function"),
    "build sets attributes": (program(EMPTY, b"}", "__class__", 1, b"sb"), "attributes"),
    "build with __setstate__": (program(EMPTY, b"}", "__setstate__", 1, b"sb"), "attributes"),
    "build of a name": (program(FLOATS, b"}", "_metadata", b"}sb"), "attributes"),
    "build of a state that is text": (program(EMPTY, "x", b"b"), "attributes"),
    "INST": (b"\x80\x02(X\x01\0\0\0aios\nsystem\n.", "INST"),
    "OBJ": (b"\x80\x02(cos\nsystem\no.", "os.system"),
    "OBJ of a known name": (b"\x80\x02(" + FLOATS_AS_GLOBAL + b"o.", "OBJ"),
    "NEWOBJ": (program(FLOATS, b")\x81"), "NEWOBJ"),
    "NEWOBJ_EX": (program(FLOATS, b")}\x92"), "NEWOBJ_EX"),
    "EXT1": (b"\x80\x02\x82\x01.", "EXT1"),
    "EXT4": (b"\x80\x02\x84\x01\0\0\0.", "EXT4"),
    "PERSID": (b"\x80\x02P0\n.", "PERSID"),
    "bytes, such as another pickle": (pickle.dumps({"a": b"cos\nsystem\n."}, 4), "SHORT_BINBYTES"),
    "a second pickle after the first": (tensor() + tensor(), "left on the stack"),
    "out of band buffers": (b"\x80\x05\x97.", "NEXT_BUFFER"),
    "protocol 0": (pickle.dumps({"a": 1}, 0), "the pickle uses"),
    "protocol 6": (b"\x80\x06}.", "protocol 6"),
    "an unknown instruction": (b"\x80\x02\xff.", "xff"),
    "POP": (b"\x80\x02}0.", "POP"),
    "empty": (b"", "ends too early"),
    "only STOP": (b".", "left on the stack"),
    "an open mark": (b"\x80\x02}(.", "left on the stack"),
    "no mark": (b"\x80\x02t.", "mark"),
    "an empty stack": (b"\x80\x02R.", "empty stack"),
    "below the mark": (b"\x80\x02}}}(s.", "empty stack"),
    "memo under the mark": (b"\x80\x02}(q\0.", "missing"),
    "append to a dict": (b"\x80\x02}Na.", "a list is missing"),
    "item of a list": (b"\x80\x02]X\x01\0\0\0aNs.", "a dict is missing"),
    "a key without a value": (b"\x80\x02}(X\x01\0\0\0au.", "no value"),
    "a key that is a number": (b"\x80\x02}K\x01Ns.", "key of type int"),
    "a key that is a tuple": (b"\x80\x02})Ns.", "key of type tuple"),
    "a key twice": (program(b"}", "a", None, b"s", "a", None, b"s"), "twice"),
    "a huge memo index that was not put": (b"\x80\x02j\xff\xff\xff\xff.", "did not keep"),
    "a huge number": (b"\x80\x02\x8a\xff" + b"\xff" * 255 + b".", "255 bytes"),
    "a number of four gigabytes": (b"\x80\x02\x8b\xff\xff\xff\x7f.", "LONG4"),
    "a text of many exabytes": (b"\x80\x04\x8d" + b"\xff" * 8 + b".", "ends too early"),
    "a text that is not UTF-8": (b"\x80\x02X\x01\0\0\0\xff.", "UTF-8"),
    "a bare tensor": (tensor()[:2] + tensor()[tensor().index(b"ctorch") : -2] + b".", "a tensor, not a dict"),
    "a nested dict": (program(b"}", "model", b"}s"), "'model' is a dict"),
    "a number in the dict": (program(b"}", "step", 3, b"s"), "'step' is a int"),
    "None in the dict": (program(b"}", "x", None, b"s"), "'x' is None"),
    "a list": (b"\x80\x02].", "a list, not a dict"),
    "strides of zero": (tensor(strides=(0, 0)), "not contiguous"),
    "strides below zero": (tensor(strides=(-3, -1)), "not contiguous"),
    "transposed": (tensor(shape=(3, 2), strides=(1, 3)), "not contiguous"),
    "expanded": (tensor(shape=(2, 3), strides=(0, 1)), "not contiguous"),
    "one stride too few": (tensor(strides=(3,)), "arguments"),
    "a shape below zero": (tensor(shape=(-2, -3)), "arguments"),
    "a shape of truths": (tensor(shape=(True, True)), "arguments"),
    "a shape that is text": (tensor(shape="23"), "arguments"),
    "a shape of texts": (tensor(shape=("2", "3")), "arguments"),
    "a hundred dimensions": (tensor(shape=(1,) * 100, strides=(1,) * 100), "arguments"),
    "beyond its storage": (tensor(offset=1), "exceeds its storage"),
    "offset below zero": (tensor(offset=-1), "arguments"),
    "offset far beyond": (tensor(offset=1 << 62), "exceeds its storage"),
    "a shape far beyond": (tensor(shape=(1 << 62, 1 << 62), strides=(1 << 62, 1)), "beyond any memory"),
    "a huge shape of nothing": (tensor(shape=(0, 1 << 62, 4), strides=(0, 4, 1)), "beyond any memory"),
    "more arguments": (tensor(rest=(False, EMPTY, None, None)), "arguments"),
    "fewer arguments": (tensor(rest=()), "arguments"),
    "negated": (tensor(rest=(False, EMPTY, b"}" + program("neg", True)[2:-1] + b"s")), "arguments"),
    "a storage longer than its bytes": (tensor(length=7), "should have 28 bytes"),
    "a storage shorter than its bytes": (tensor(length=5, shape=(5,), strides=(1,)), "should have 20 bytes"),
    "a storage of another type": (tensor(kind=Name("torch.DoubleStorage")), "should have 48 bytes"),
    "a storage below zero": (tensor(length=-6), "storage"),
    "a storage that is not there": (tensor(key="1"), "storage '1', which is not in the file"),
    "a storage outside": (tensor(key="../../../etc/passwd"), "not in the file"),
    "a storage of no known class": (tensor(kind=Name("collections.OrderedDict")), "storage in a way"),
    "an unknown class": (tensor(kind=Name("torch.storage.UntypedStorage")), "torch.storage.UntypedStorage"),
    "a persistent id that is text": (program("os", b"Q"), "storage in a way"),
    "a parameter of nothing": (program(Name("torch._utils._rebuild_parameter"), (None,), b"R"), "_rebuild_parameter"),
    "a quantized tensor": (program(Name("torch._utils._rebuild_qtensor")), "_rebuild_qtensor"),
}


@pytest.mark.parametrize("name", list(HOSTILE))
def test_pickles_of_anything_but_plain_tensors_are_refused(tmp_path, name):
    pickled, word = HOSTILE[name]
    with pytest.raises(ValueError) as error:
        opened(tmp_path, archive(pickled))
    text = refusal(error)
    assert str(tmp_path / "x.pth") in text and word in text, text


_FULL = torch_pickle.MAX_BYTES - 100
COSTLY = {
    "dicts": b"\x80\x02" + b"}" * _FULL,
    "marks": b"\x80\x02" + b"(" * _FULL,
    "tuples in tuples": b"\x80\x02)" + b"\x85" * _FULL + b".",
    "a tuple of itself twice, and so on": b"\x80\x02)" + b"q\0h\0\x86" * (_FULL // 5) + b".",
    "lists in themselves": b"\x80\x02]" + b"q\0h\0a" * (_FULL // 5) + b".",
    "memo": b"\x80\x02}" + b"\x94" * _FULL + b".",
    "a long shape, many times": b"\x80\x02" + b"".join(
        [REBUILD_AS_GLOBAL := b"ctorch._utils\n_rebuild_tensor_v2\nq\0", b"(NN(", b"K\1" * 200_000, b"tq\1q\2tq\3"]
    ) + b"h\0h\3R" * 20_000 + b".",
    "huge memo indices": b"\x80\x02}" + b"".join(b"r" + struct.pack("<I", (1 << 31) + i) for i in range(1000)) + b".",
}  # fmt: skip


@pytest.mark.parametrize("name", list(COSTLY))
def test_no_pickle_takes_memory_or_time_out_of_proportion(tmp_path, name):
    data = archive(COSTLY[name])
    (tmp_path / "x.pth").write_bytes(data)
    tracemalloc.start()
    try:
        found = torch_file.open_file(tmp_path / "x.pth")
        assert name == "huge memo indices" and found == {}
    except ValueError as error:
        assert len(str(error)) < 600
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < len(data) + 64_000_000


def _patched(data, marker, offset, value, *, last=True):
    """Bytes put at an offset from a marker."""
    at = (data.rindex(marker) if last else data.index(marker)) + offset
    return data[:at] + value + data[at + len(value) :]


_SOUND = archive(tensor())  # two members, and their entries in the directory: the pickle's first
_LONGER = len(tensor()) + 10
_END, _ENTRY, _HEADER = b"PK\5\6", b"PK\1\2", b"PK\3\4"
ARCHIVES = {
    "empty": (b"", "not a file of torch.save"),
    "text": (b"hello, world", "not a file of torch.save"),
    "a bare pickle": (pickle.dumps({}), "bare pickle"),
    "torch before 1.6": (pickle.dumps(0x1950A86A20F9469CFC6C, 2), "before 1.6"),
    "safetensors": (struct.pack("<Q", 2) + b"{}", "a safetensors file"),
    "GGUF": (b"GGUF\3\0\0\0", "a GGUF file"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS"),
    "no pickle": (_SOUND.replace(b"x/data.pkl", b"x/data.pxl"), "0 files <folder>/data.pkl"),
    "two pickles": (archive(tensor(), **{"y/data.pkl": b""}), "2 files <folder>/data.pkl"),
    "a pickle further down": (_SOUND.replace(b"x/data.pkl", b"x/y/zz.pkl"), "0 files <folder>/data.pkl"),
    "compressed": (archive(tensor(), how=zipfile.ZIP_DEFLATED), "compressed"),
    "encrypted": (_patched(_SOUND, _ENTRY, 8, b"\1"), "encrypted"),
    "a path that climbs": (archive(tensor(), **{"../../x": b""}), "outside of its folder"),
    "an absolute path": (archive(tensor(), **{"/etc/passwd": b""}), "outside of its folder"),
    "big-endian": (archive(tensor(), **{"x/byteorder": b"big"}), "little-endian"),
    "big-endian in six letters": (archive(tensor(), **{"x/byteorder": b"bigbig"}), "little-endian"),
    "a damaged pickle": (_patched(_SOUND, b"storage", 0, b"S", last=False), "checksum"),
    "one name twice": (archive(tensor(), **{"x/data/1": b""}).replace(b"x/data/1", b"x/data/0"), "twice"),
    "a count that is too large": (_patched(_SOUND, _END, 8, b"\3\0\3\0"), "directory is damaged"),
    "a count that is too small": (_patched(_SOUND, _END, 8, b"\1\0\1\0"), "directory is damaged"),
    "a directory elsewhere": (_patched(_SOUND, _END, 16, b"\1\0\0\0"), "directory is not at the offset"),
    "a directory far away": (_patched(_SOUND, _END, 16, b"\xf0\xff\xff\xff"), "directory is not at the offset"),
    "a member far away": (_patched(_SOUND, _ENTRY, 42, b"\xf0\xff\xff\xff"), "after the end of the data"),
    "a member elsewhere": (_patched(_SOUND, _ENTRY, 42, b"\1\0\0\0"), "not where the zip directory says"),
    "a member of another name": (_patched(_SOUND, b"x/data/0", 7, b"1", last=False), "not where the zip directory"),
    "a size that is too large": (_patched(_SOUND, _ENTRY, 20, b"\xf0\xff\xff\x7f" * 2), "ends after the end"),
    "a size in 64 bits that is not there": (_patched(_SOUND, _ENTRY, 20, b"\xff\xff\xff\xff" * 2), "no size"),
    "two sizes": (_patched(_SOUND, _ENTRY, 20, b"\1"), "compressed"),
    "a long name": (_patched(_SOUND, _ENTRY, 28, b"\xff\xff"), "the zip directory is damaged"),
    "a long extra field in the member": (_patched(_SOUND, _HEADER, 28, b"\xff\xff"), "ends after the end"),
    "members that overlap": (_patched(_SOUND, _ENTRY, 20, struct.pack("<I", _LONGER) * 2, last=False), "overlap"),
    "text after the end": (_SOUND + b"\n", "cut off"),
    "a 64-bit end far away": (_SOUND[: _SOUND.rindex(_END)] + struct.pack("<4sIQI", b"PK\6\7", 0, 1 << 62, 1)
                              + _SOUND[_SOUND.rindex(_END) :], "directory is damaged"),
    "many members": (archive(b"", **{f"x/{i}": b"" for i in range(10_000)}), "10,002 members"),
    "a long pickle": (archive(b"}" * (torch_pickle.MAX_BYTES + 1)), "data.pkl has"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(ARCHIVES))
def test_archives_that_are_not_torchs_are_refused(tmp_path, name):
    data, word = ARCHIVES[name]
    with pytest.raises(ValueError) as error:
        opened(tmp_path, data)
    text = refusal(error)
    assert str(tmp_path / "x.pth") in text and word in text, text


def test_a_file_that_was_cut_off_is_refused_wherever_it_was_cut(tmp_path):
    data = (GOLDEN / "one" / "consolidated.00.pth").read_bytes()
    for length in (*range(0, 100), *range(100, len(data), 997), *range(len(data) - 100, len(data))):
        with pytest.raises(ValueError) as error:
            opened(tmp_path, data[:length])
        assert "cut off" in refusal(error) or length < 4


def test_damaged_bytes_are_refused_or_harmless(tmp_path):
    """Any byte of the pickle or of the directory, changed at random: tensors of the same names, or one line."""
    data = (GOLDEN / "tied" / "consolidated.00.pth").read_bytes()
    draw = np.random.RandomState(0)
    names, directory = set(torch_file.open_file(GOLDEN / "tied" / "consolidated.00.pth")), data.index(_ENTRY)
    for i in range(1500):
        at = draw.randint(directory, len(data)) if i % 2 else draw.randint(0, 4000)
        spoiled = data[:at] + bytes([draw.randint(256)]) + data[at + 1 :]
        try:
            assert set(opened(tmp_path, spoiled)) == names
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 600


def test_damaged_pickles_are_refused_or_harmless():
    """The same of the pickle alone, past its checksum."""
    path = GOLDEN / "one" / "consolidated.00.pth"
    with zipfile.ZipFile(path) as whole:
        data = whole.read(next(name for name in whole.namelist() if name.endswith("data.pkl")))
    draw = np.random.RandomState(0)
    for _ in range(3000):
        spoiled = bytearray(data)
        for at in draw.randint(0, len(data), draw.randint(1, 4)):
            spoiled[at] = draw.randint(256)
        try:
            torch_pickle.load(bytes(spoiled))
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 600
