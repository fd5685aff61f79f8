"""Generates the Python code for proto/cbp_proto/v1, or with --check fails if the code there is not what it would be."""

import argparse
import filecmp
import sys
import sysconfig
import tempfile
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent / "proto"
PACKAGE = Path("cbp_proto/v1")


def generate(target: Path) -> None:
    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / PACKAGE).glob("*.proto"))
    outputs = [f"--{kind}_out={target}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    scripts = Path(sysconfig.get_path("scripts"))
    plugins = [f"--plugin=protoc-gen-{kind}={scripts}/protoc-gen-{kind}" for kind in ("mypy", "mypy_grpc")]
    if protoc.main(["protoc", f"-I{ROOT}", f"-I{well_known}", *plugins, *outputs, *sources]) != 0:
        sys.exit("protoc failed")
    for name in ("learner", "spec", "tensor"):  # files without a service
        for path in (target / PACKAGE).glob(f"{name}_pb2_grpc.py*"):
            path.unlink()


def generated_files(directory: Path) -> set[str]:
    return {path.name for path in (directory / PACKAGE).glob("*_pb2*.py*")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail on a difference")
    if not parser.parse_args().check:
        generate(ROOT)
        return
    with tempfile.TemporaryDirectory() as temporary:
        generate(Path(temporary))
        names = generated_files(ROOT) | generated_files(Path(temporary))
        _, changed, missing = filecmp.cmpfiles(ROOT / PACKAGE, Path(temporary) / PACKAGE, sorted(names), shallow=False)
    if changed or missing:
        sys.exit(f"generated code differs from the .proto files ({', '.join(changed + missing)}): run `make proto`")


if __name__ == "__main__":
    main()
