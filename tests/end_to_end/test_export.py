"""What a server has saved becomes a plain PyTorch module where nothing of the service can be imported."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from wire import SMALL_SPEC

from cbp_proto import decode_tensor

EXPORT = (Path(__file__).parents[2] / "docs" / "export.md").read_text(encoding="utf-8")
ABSENT = ("cbp_server", "cbp_client", "cbp_proto", "grpc", "google.protobuf", "fastapi", "prometheus_client", "onnx")


def three_lines():
    [snippet] = re.findall(r"```python\n(.*?)```", EXPORT.partition("The file is what")[0], re.DOTALL)
    assert len([line for line in snippet.splitlines() if line]) == 3
    return snippet


def predictions(directory, features):
    """[N, C], by the module that the three lines make of the file in the directory."""
    script = [
        f"import sys; sys.modules.update(dict.fromkeys({ABSENT!r}))",
        three_lines(),
        "import json, torch",
        "assert type(module) is torch.nn.Sequential",
        f"print(json.dumps(module(torch.tensor({features.tolist()!r})).tolist()))",
    ]
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", "\n".join(script)],
        cwd=directory, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return np.array(json.loads(run.stdout))


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_three_lines_make_a_module_of_what_the_service_wrote(own_server, connect, examples, tmp_path, activation):
    wire = connect(own_server.grpc_target)
    wire.create("clicks", network=SMALL_SPEC["network"] | {"activation": activation})
    stream = wire.stream("clicks")
    stream.send_batch(1, *examples(200))
    stream.results(1)
    probe, _ = examples(9, seed=99)
    expected = decode_tensor(wire.predict("clicks", probe).outputs)

    command = ["cbp", "--server", own_server.grpc_target, "learners", "export", "clicks", "clicks.safetensors"]
    call = f"import sys; sys.argv = {command!r}; from cbp_client.cli import main; main()"
    subprocess.run([sys.executable, "-c", call], cwd=tmp_path, check=True, timeout=60)
    np.testing.assert_allclose(predictions(tmp_path, probe), expected, rtol=1e-5, atol=1e-6)

    own_server.stop()  # which writes a checkpoint
    checkpoints = own_server.data_dir.glob("checkpoints/*/*.safetensors")
    newest = max(checkpoints, key=lambda path: int(path.stem))
    (tmp_path / "clicks.safetensors").write_bytes(newest.read_bytes())
    np.testing.assert_allclose(predictions(tmp_path, probe), expected, rtol=1e-5, atol=1e-6)
