"""What the README shows works, to the letter."""

import re
import subprocess
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_python_snippet_runs_against_a_server(server):
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    generator = np.random.default_rng(0)
    batches = [(generator.normal(size=(20, 64)), generator.integers(0, 10, 20)) for _ in range(5)]
    namespace = {"batches": batches}

    for _ in range(2):  # a program is run more than once
        exec(snippet.replace("localhost:50051", server.grpc_target), namespace)

    with namespace["Client"](server.grpc_target) as client:
        info = client.get_learner("clicks").info
        assert info.progress.examples == 200
        assert info.spec["resets"]["layers"] == ["all"]
        client.get_learner("clicks").delete()


def test_every_local_link_leads_somewhere():
    documents = [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]
    broken = []
    for document in documents:
        for link in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", document.read_text()):
            if not (document.parent / link).exists():
                broken.append(f"{document.relative_to(ROOT)}: {link}")
    assert broken == []


def test_make_lists_every_target_with_its_help():
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    makefile = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    for target in phony.split():
        assert re.search(rf"^\s+{target}\s+\S", listed, re.MULTILINE), target
