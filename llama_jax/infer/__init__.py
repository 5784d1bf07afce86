"""Floor 5: inference. `llama` is the public interface, and `engine` has the compiled programs."""
