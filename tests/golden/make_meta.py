"""Regenerate meta/: tiny checkpoints that Meta's own code saved with torch.save, and its logits with them.

Beside them published.json: the params.json of the published sizes, as Meta's list of models has them.

    pip install torch numpy
    pip install --no-deps llama-models fairscale       # Meta's model, and the layers that it is split with
    python tests/golden/make_meta.py

Each folder is what Meta publishes: params.json and one consolidated.NN.pth for each device. Where there are two, two
processes run fairscale's model-parallel layers, each on its own file, so that the split and the logits are theirs.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent / "meta"
ROWS, LENGTH, VOCAB = 2, 12, 32

_SHAPE = {"dim": 16, "n_layers": 2, "n_heads": 4, "norm_eps": 1e-5}
_LLAMA3 = {**_SHAPE, "n_kv_heads": 2, "vocab_size": VOCAB, "rope_theta": 500_000.0}
# params.json, files, the type of the weights, and the embedding's class where it is not Llama 3's.
CASES: dict[str, tuple[dict[str, Any], int, str]] = {
    # 3.1 8B's settings, a state_dict as it is.
    "one": (_LLAMA3 | {"multiple_of": 8, "ffn_dim_multiplier": 1.3, "use_scaled_rope": True}, 1, "bfloat16"),
    # A dict of nn.Parameters, of which two are one, and in the newest pickle protocol.
    "tied": (_LLAMA3 | {"multiple_of": 8, "ffn_dim_multiplier": 1.5, "use_scaled_rope": True}, 1, "bfloat16"),
    # Llama 3 70B's: two devices, the embedding split along its rows.
    "split": (_LLAMA3 | {"multiple_of": 16, "vocab_size": -1}, 2, "float32"),
    # Llama 2's: the embedding split along its columns, rope.freqs in the file, nothing said of vocabulary and theta.
    "llama2": (_SHAPE | {"multiple_of": 32, "vocab_size": -1}, 2, "float16"),
}
# Our sizes, by the names that Meta's list gives them.
PUBLISHED = {
    "llama3-8b": "Llama-3-8B",
    "llama3-70b": "Llama-3-70B",
    "llama3.1-8b": "Llama3.1-8B",
    "llama3.1-70b": "Llama3.1-70B",
    "llama3.1-405b": "Llama3.1-405B:bf16-mp8",
    "llama3.2-1b": "Llama3.2-1B",
    "llama3.2-3b": "Llama3.2-3B",
    "llama3.3-70b": "Llama3.3-70B-Instruct",
}


def tokens() -> np.ndarray:
    """Token ids (ROWS, LENGTH), the same every time."""
    return np.random.RandomState(7).randint(0, VOCAB, (ROWS, LENGTH))


def _build(case: str, params: dict[str, Any]) -> Any:
    """Meta's model, whole on one device or this process's part of it."""
    from fairscale.nn.model_parallel import layers
    from llama_models.llama3 import model

    model.VocabParallelEmbedding = layers.ParallelEmbedding if case == "llama2" else layers.VocabParallelEmbedding
    known = {"vocab_size": VOCAB, "rope_theta": 10_000.0} | params | {"vocab_size": VOCAB}
    return model.Transformer(model.ModelArgs(**known, max_batch_size=ROWS, max_seq_len=LENGTH)).eval()


def _process(rank: int, case: str) -> None:
    import torch
    from fairscale.nn.model_parallel import initialize

    params, world, dtype = CASES[case]
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29517"}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    initialize.initialize_model_parallel(world)
    model = _build(case, params)
    for name, weight in sorted(model.named_parameters()):
        # Norms are the same on all devices; everything else is drawn for each.
        draw = torch.Generator().manual_seed(sum(name.encode()) * 10 + (0 if "norm" in name else rank))
        noise = torch.randn(weight.shape, generator=draw)
        values = 1 + 0.2 * noise if weight.ndim == 1 else 1.5 * noise / params["dim"] ** 0.5
        weight.data = values.to(getattr(torch, dtype))
    if case == "tied":
        model.output.weight = model.tok_embeddings.weight
    state = model.state_dict()
    folder = HERE / case
    if case == "tied":
        state = dict(model.named_parameters(remove_duplicate=False))
    if case == "llama2":
        state["rope.freqs"] = torch.arange(4).to(torch.float16)
    torch.save(state, folder / f"consolidated.{rank:02}.pth", pickle_protocol=4 if case == "tied" else 2)
    logits = model.float()(torch.from_numpy(tokens()), 0)
    if rank == 0:
        (folder / "params.json").write_text(json.dumps(params))
        np.save(folder / "logits.npy", logits.numpy())
    torch.distributed.destroy_process_group()


def main() -> None:
    """Write the folders of meta/ anew."""
    import torch.multiprocessing

    shutil.rmtree(HERE, ignore_errors=True)
    for case, (_, world, _) in CASES.items():
        (HERE / case).mkdir(parents=True)
        torch.multiprocessing.spawn(_process, (case,), nprocs=world)
    from llama_models.sku_list import all_registered_models

    settings = {model.descriptor(): model.arch_args for model in all_registered_models()}
    published = {ours: settings[theirs] for ours, theirs in PUBLISHED.items()}
    (HERE / "published.json").write_text(json.dumps(published, indent=1))
    files = sorted(path for path in HERE.rglob("*") if path.is_file())
    for path in files:
        print(f"{path.relative_to(HERE)}: {path.stat().st_size:,} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
