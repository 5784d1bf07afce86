"""Floor 5: sampling. `llama` is the public face, `engine` the compiled prefill and decode under it."""
