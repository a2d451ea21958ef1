"""Errors that are told in one sentence: input that a person can correct, and failures that say all there is."""


class Failure(RuntimeError):
    """Something failed, and the message says all that a person needs: the command line prints it and ends with 1."""


class InvalidInput(ValueError):
    """A field holds a value that is not allowed.

    The command line prints it as one sentence and ends with exit code 2; every other exception is a
    failure and ends with 1.

    Args:
        field: Name of the argument, option or column, spelled as the person typed it.
        value: The offending value.
        allowed: What is allowed, as a phrase that follows "must be" ("a number above 0").
        hint: What to do about it, as a sentence of its own; may be empty.
    """

    def __init__(self, field: str, value: object, allowed: str, hint: str = "") -> None:
        self.field = field
        self.value = value
        self.allowed = allowed
        self.hint = hint
        sentence = f"{field} is {value!r}; it must be {allowed}."
        super().__init__(f"{sentence} {hint}".strip())

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        # Exceptions cross process boundaries; the default would call __init__ with one argument.
        return type(self), (self.field, self.value, self.allowed, self.hint)
