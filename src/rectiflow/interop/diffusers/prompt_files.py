"""Files of prompts, one a line."""

from __future__ import annotations

import warnings
from pathlib import Path

from rectiflow.errors import positive

LONGEST = 4000


def read_prompts(source: str | Path, *, longest: int = LONGEST, cut: bool = False) -> list[str]:
    """The prompts of a text file: one a line, blank lines skipped.

    Text encoders look at 77 (CLIP) to 512 (T5) tokens, so a line of thousands of characters is a
    file of another kind rather than a prompt.

    Args:
        source: the file, or `prompts:FILE`.
        longest: most characters of a line.
        cut: cut longer lines and warn, instead of refusing them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no prompt in it, text that is not UTF-8, or a line that is too long.

    Example:
        >>> import tempfile, pathlib
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "prompts.txt"
        >>> _ = file.write_text("a red fox\\n\\na blue door\\n")
        >>> read_prompts(f"prompts:{file}")
        ['a red fox', 'a blue door']
    """
    positive("longest", longest)
    file = Path(str(source).removeprefix("prompts:"))
    if not file.is_file():
        raise FileNotFoundError(
            f"no file of prompts at {file}: give a text file, one prompt a line"
        )
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not UTF-8 text: save it as UTF-8, one prompt a line") from None
    prompts, shortened = [], 0
    for number, line in enumerate(lines, 1):
        prompt = line.strip()
        if len(prompt) > longest:
            if not cut:
                raise ValueError(
                    f"line {number} of {file} has {len(prompt)} characters, at most {longest} are "
                    "accepted: one prompt a line, or cut=True to cut it"
                )
            prompt, shortened = prompt[:longest], shortened + 1
        if prompt:
            prompts.append(prompt)
    if not prompts:
        raise ValueError(f"{file} holds no prompts: write one a line")
    if shortened:
        warnings.warn(
            f"{shortened} prompts of {file} were cut to {longest} characters", stacklevel=2
        )
    return prompts
