"""Environments of their own for libraries that must not, or cannot, stand beside fedsim's: made by pip, once."""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from fedsim.errors import Failure

READY = ".ready"


def environment(folder: Path, requirements: Sequence[str], *, without_dependencies: Sequence[str] = ()) -> Path:
    """The Python of an environment that has these packages; made on first use, and anew where they are others.

    Args:
        folder: Where it is kept.
        requirements: What pip is asked for, together.
        without_dependencies: What is installed afterwards, though it asks for what pip cannot find or put together.

    Raises:
        Failure: With pip's last words, where it cannot install them; nothing is kept then.
    """
    python, ready = folder / "bin" / "python", folder / READY
    wanted = "\n".join([*requirements, "--no-deps", *without_dependencies])
    if ready.is_file() and ready.read_text(encoding="utf-8") == wanted:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    print(
        f"  making an environment in {folder} (once): {', '.join((*requirements, *without_dependencies))}", flush=True
    )
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    asked = [[*pip, *requirements], *([[*pip, "--no-deps", *without_dependencies]] if without_dependencies else [])]
    for command in asked:
        done = subprocess.run(command, check=False, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            shutil.rmtree(folder)
            errors = [line for line in done.stderr.splitlines() if "ERROR" in line] or [done.stderr[-500:]]
            raise Failure(f"pip cannot install {' '.join(command[5:])}: {' '.join(errors[-2:])}")
    ready.write_text(wanted, encoding="utf-8")
    return python
