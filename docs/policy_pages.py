"""Pages that are made when the site is built: one for each registered policy, and the changelog."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from kvpress.policies import describe_policies
from kvpress.policies.registry import Description, policy_class

ROOT = Path(__file__).resolve().parent.parent


def on_files(files: Files, config: Any) -> Files:
    """Called by mkdocs with the files of `docs/`."""
    rows = describe_policies()
    listed = [f"- [`{row.name}`]({row.name}.md) ({row.kind}): {row.summary}" for row in rows]
    pages = {"policy/index.md": "# Each policy\n\n" + "\n".join(listed) + "\n"}
    pages |= {f"policy/{row.name}.md": policy_page(row) for row in rows}
    pages["changes.md"] = (ROOT / "CHANGELOG.md").read_text("utf-8")
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    return files


def policy_page(row: Description) -> str:
    """What a policy keeps or reads, its parameters, when it fails, and its documentation."""
    found = policy_class(row.name)
    verb = "Keeps" if row.kind == "eviction" else "Attends to"
    required = [name for name, default in row.parameters.items() if default == "required"]
    given = "".join(f", {name}=1024" for name in required)
    cells = [
        f"| `{name}` | {'required' if value == 'required' else f'`{value!r}`'} |"
        for name, value in row.parameters.items()
    ]
    paper = (
        f"[{row.paper}](https://arxiv.org/abs/{row.paper.split()[-1]})" if row.paper.startswith("arXiv") else row.paper
    )
    return "\n".join(
        [
            f"# {row.class_name}",
            "",
            f"{verb} {row.summary}. Needs {row.needs}. Source: {paper}.",
            "",
            f"**Not for**: {found.fails}.",
            "",
            "```python",
            f'cache = PolicyCache(model, "{row.name}"{given})',
            "```",
            "",
            "| parameter | default |",
            "| --- | --- |",
            *cells,
            "",
            f"::: {found.__module__}.{found.__qualname__}",
            "    options: {members: false}",
            "",
        ]
    )
