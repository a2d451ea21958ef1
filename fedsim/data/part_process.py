"""A process that makes parts for another, until that one has no more. Run as a module: a worker of fedsim.data.spool.

Reads pickles from standard input: a `PartWriter`, and then the arguments of each call of its `write`. Writes a pickle
for each to standard output: the fingerprint of the tokenizer as it is here, and then what the call returned, or the
exception that it raised.
"""

import ctypes
import os
import pickle
import signal
import sys

SIGNAL_AT_PARENTS_DEATH = 1
"""PR_SET_PDEATHSIG of Linux."""


def main() -> None:
    """Answer until the other side closes the pipe, or is gone."""
    _end_with(int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever asked for the parts decides when to stop
    asked = sys.stdin.buffer
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a tokenizer may print is no answer
    writer = None
    while True:
        try:
            given = pickle.load(asked)
        except EOFError:
            return
        except Exception as error:  # the tokenizer is of a module that is only in the other process
            given = error
        answer: object
        try:
            if isinstance(given, Exception):
                raise given
            if writer is None:
                writer, answer = given, given.encoder.found_fingerprint()
            else:
                answer = writer.write(*given)
        except Exception as error:
            answer = error
        try:
            told = pickle.dumps(answer)
        except Exception:  # an exception of a library that cannot be sent is told in its words
            told = pickle.dumps(RuntimeError(f"{type(answer).__name__}: {answer}"))
        try:
            answers.write(told)
            answers.flush()
        except BrokenPipeError:
            return


def _end_with(parent: int) -> None:
    """Do not finish a part for a parent that was killed: another build may have begun in its place."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SIGNAL_AT_PARENTS_DEATH, int(signal.SIGKILL))
    if os.getppid() != parent:  # it was gone before
        os._exit(1)


if __name__ == "__main__":
    main()
