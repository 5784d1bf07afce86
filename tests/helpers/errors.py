"""A helper of the tests: messages of errors."""


def refusal(error):
    """The message of a caught error, which must be one line of a readable length."""
    text = str(error.value)
    assert "\n" not in text and 10 < len(text) < 600
    return text
