"""`python -m llama_jax COMMAND ...` is the program `llama-jax`."""

from llama_jax.cli.commands import entry

if __name__ == "__main__":
    entry()
