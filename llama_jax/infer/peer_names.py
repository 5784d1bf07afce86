"""Attributes of models in transformers, vLLM and llama-cpp-python, with what to write here.

A message says "here it is" before each.
"""

from llama_jax.peer_arguments import CPU, LEAVE

LLAMA = {
    "save_pretrained": "save(path)",
    "push_to_hub": "save(path), and `hf upload`",
    **dict.fromkeys(("from_pretrained", "load", "from_checkpoint"), "llama_jax.load(name)"),
    **dict.fromkeys(("to", "cuda"), f"mesh=... of llama_jax.load; {CPU}"),
    "device": "mesh",
    "dtype": "engine.dtype",
    "eval": f"the only mode: {LEAVE}",
    "forward": "logits(tokens)",
    "generation_config": "sampling",
    "num_parameters": "config.num_params",
    "merge_and_unload": "load(..., adapters=...) and save(path), which merges",
    "load_adapter": "add_adapter(name, folder) and use(name)",
    "set_adapter": "use(name)",
    "streamer": "stream(prompt)",
    "train": "llama_jax.train.run.train(run)",
    **dict.fromkeys(("parameters", "state_dict"), "params, a tree of arrays"),
    "print_trainable_parameters": "config.num_params, and a run prints the number that it trains",
    **dict.fromkeys(("half", "float", "bfloat16"), "dtype=... of llama_jax.load"),
    "apply_chat_template": "encode_dialog(messages), or chat(messages) for the answer",
    **dict.fromkeys(("embed", "create_embedding", "get_input_embeddings"), "hidden(texts), or params['embed']"),
    **dict.fromkeys(("create_chat_completion", "create_completion"), "chat(messages) and generate(prompt)"),
    **dict.fromkeys(("encode", "tokenize"), "tokenizer.encode(text)"),
}
