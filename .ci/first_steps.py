"""Run the Python of a page, without what needs an extra, with the package that is installed.

python .ci/first_steps.py README.md
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import titans_pytorch

EXTRAS = ("titans_pytorch.hf",)


def main() -> None:
    page = Path(sys.argv[1])
    where = Path(titans_pytorch.__file__).resolve()
    if page.resolve().parent in where.parents:
        raise SystemExit(f"the package must be installed, got {where}, that of the checkout")
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    taken = [block for block in blocks if not any(extra in block for extra in EXTRAS)]
    names: dict[str, object] = {}
    for block in taken:
        exec(compile(block, str(page), "exec"), names)
    print(f"{len(taken)} of {len(blocks)} blocks of {page.name} ran with titans_pytorch {titans_pytorch.__version__}")


if __name__ == "__main__":
    main()
