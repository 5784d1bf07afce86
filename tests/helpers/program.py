"""A helper of the tests: the program `llama-jax` in this process."""

from llama_jax.cli import commands, exits


def program(*argv) -> int:
    """Run `llama-jax ARGV...` and return its exit status. Errors are a line on standard error, as outside."""
    return exits.run(commands.main, [str(arg) for arg in argv])
