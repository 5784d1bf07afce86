"""Floor 5: inference. `llama` is the public interface, `scheduler` the queue, and `program` the compiled programs."""
