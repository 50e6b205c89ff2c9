# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The documents name only what is there; the checker that says so finds what is wrong."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHECKER = runpy.run_path(str(ROOT / "scripts" / "check_links.py"))


@pytest.fixture(scope="module")
def names() -> Any:
    return CHECKER["Names"].real()


def problems(folder: Path, names: Any, **pages: str) -> list[str]:
    """What the checker finds in pages of a folder of their own; `docs__a` is docs/a.md."""
    for name, text in pages.items():
        path = folder / f"{name.replace('__', '/')}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    found = CHECKER["check"](folder, names)
    assert isinstance(found, list)
    return found


def test_every_page_of_the_repository_is_right(names: Any) -> None:
    assert CHECKER["check"](ROOT, names) == []


def test_the_index_leads_to_every_page() -> None:
    docs = ROOT / "docs"
    index = (docs / "README.md").read_text(encoding="utf-8")
    # Reports of single runs are listed by docs/results/README.md.
    pages = [path for path in CHECKER["markdown_files"](docs) if path.relative_to(docs).parts[0] != "results"]
    assert len(pages) > 15
    missing = [name for path in pages if f"({(name := path.relative_to(docs).as_posix())})" not in index]
    assert missing == ["README.md"]


def test_paths_that_are_elsewhere_are_still_written_so() -> None:
    for page, path in CHECKER["ELSEWHERE"]:
        assert f"`{path}`" in (ROOT / page).read_text(encoding="utf-8")
        assert not (ROOT / path).exists()


def test_the_readme_names_every_field_of_the_configuration(names: Any) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [field for field in sorted(names.fields) if f"`{field}`" not in readme] == []


def test_concept_pictures_are_those_that_their_script_draws() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "concept_pictures.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[a](b.md)", "there is no docs/b.md"),
        ("![a](b.png)", "there is no docs/b.png"),
        ("[a](../../x.md)", "leaves the repository"),
        ("[a](/x.md)", "neither relative nor http"),
        ("[a](#nowhere)\n\n# Here", "has no heading for it; it has: here"),
        ("[a](https://nohost/x)", "no usable address"),
        ("see http:///x", "no usable address"),
        ("`scoring/nothing.py`", "is not there"),
        ("`scoring/*.txt`", "is not there"),
        ("`no_such_module_anywhere.py`", "no file of the repository"),
        ("`deltamem evil`", "deltamem has no command 'evil'"),
        ("`deltamem model put x`", "deltamem model has no command 'put'"),
        ("`deltamem eval --sample 3`", "deltamem eval has no option --sample;"),
        ("```bash\nX=1 .venv/bin/deltamem bench \\\n  --quickly\n```", "deltamem bench has no option --quickly"),
        ("```console\n$ deltamem plan --gb 3\nout\n```", "deltamem plan has no option --gb"),
        ("\n    deltamem calibrate MODEL [--outer DIR]", "has no option --outer"),
        ("```bash\nM=$(deltamem model fetch smollm2)\n```", "has no command 'fetch'"),
        ("`--deltamem-config.keepratio 1`", "'keepratio' is no field"),
        ("""`--deltamem-config '{"keep_ratio": 1, "scorers": 2}'`""", "'scorers' is no field"),
        ("""```python\nLLM(m, additional_config={"deltamem": {"keep": 0.25}})\n```""", "'keep' is no field"),
        ("```yaml\ndeltamem-config:\n  keep_rat: 0.1\n```", "'keep_rat' is no field"),
        ("| field | default |\n| --- | --- |\n| `modus` | x |", "'modus' is no field"),
        ("`deltamem_evictd_tokens_total`", "neither a metric nor a key"),
        ("`deltamem_keepratio`", "neither a metric nor a key"),
    ],
)
def test_what_is_wrong_is_found(text: str, said: str, names: Any, tmp_path: Path) -> None:
    (tmp_path / "scoring").mkdir()
    found = problems(tmp_path, names, docs__a=text)
    assert len(found) == 1, found
    assert found[0].startswith("docs/a.md:")
    assert said in found[0]


RIGHT = """\
# The first: `code`, and *more*

## Twice

## Twice

[a](b.md#one-two) [b](#the-first-code-and-more) [c](#twice-1) [d](https://example.org/x_(y)) <https://example.org>
`b.md` `scoring/` `build/anything.md` `deltamem scorers` `deltamem eval --lengths=2048 my.yaml  # why`
`deltamem_keep_ratio` `deltamem_evicted_tokens_total` `deltamem config: unknown key 'x'` `owner/name`

    deltamem calibrate MODEL [--out DIR] | tee log --not-ours

```text
deltamem nothing --at all
```

```yaml
kv-cache-policy: deltamem
deltamem-config:
  # a comment
  mode: always
other: 1
```
"""


def test_what_is_right_passes(names: Any, tmp_path: Path) -> None:
    (tmp_path / "scoring").mkdir()
    assert problems(tmp_path, names, docs__a=RIGHT, docs__b="# One, two\n") == []


def test_built_and_hidden_folders_are_left_out(names: Any, tmp_path: Path) -> None:
    assert problems(tmp_path, names, build__a="[a](b.md)", **{".venv__a": "[a](b.md)"}) == []


def test_the_command_prints_each_problem_and_fails(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("x\n\n[a](b.md)\n", encoding="utf-8")
    command = [sys.executable, str(ROOT / "scripts" / "check_links.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert done.stdout.splitlines() == ["a.md:3: link 'b.md': there is no b.md", "1 pages, 1 problems"]
