"""cbp predict: ask a learner about the examples of a file."""

import csv
import sys
from pathlib import Path
from typing import Annotated, Any, TextIO

import numpy as np
import typer
from numpy.typing import NDArray

from cbp_client.cli.files import read_examples
from cbp_client.cli.session import CommandError, messages, session
from cbp_client.types import Prediction

_ROWS_PER_CALL = 4096
_BYTES_PER_CALL = 8 * 1024 * 1024  # of features and of outputs


def predict(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="npz with features; csv with a header; parquet.")],
    learner_id: Annotated[str, typer.Option("--learner", metavar="ID", help="Which learner.")],
    ignore: Annotated[
        list[str] | None,
        typer.Option(metavar="COLUMN", help="csv, parquet: a column that is no feature; may be repeated."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write npz or csv here rather than csv to standard output.")
    ] = None,
) -> None:
    """Predict for every row of a file: raw outputs, and for classifiers the label."""
    if output is not None and output.suffix not in (".npz", ".csv"):
        raise CommandError(f"{output}: the name must end in .npz or .csv")
    features = read_examples(file, ignore=ignore or ()).features
    with session(context).connect() as client:
        learner = client.get_learner(learner_id)
        row_bytes = max(features[:1].nbytes, 4 * learner.info.spec["network"]["out_features"])
        rows = max(1, min(_ROWS_PER_CALL, _BYTES_PER_CALL // row_bytes))
        parts = [learner.predict(features[start : start + rows]) for start in range(0, len(features), rows)]
    prediction = Prediction(np.concatenate([part.outputs for part in parts]), parts[-1].step)
    labels = prediction.labels if learner.info.spec["loss"]["kind"] == "cross_entropy" else None
    if output is None:
        _write_csv(sys.stdout, prediction, labels)
    else:
        try:
            _write_file(output, prediction, labels)
        except OSError as error:
            raise CommandError(f"{output}: {error.strerror or error}") from None
    messages().print(f"{len(prediction.outputs)} predictions at step {prediction.step}")


def _write_file(path: Path, prediction: Prediction, labels: NDArray[np.int64] | None) -> None:
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            _write_csv(file, prediction, labels)
    else:
        arrays: dict[str, Any] = {"outputs": prediction.outputs} | ({} if labels is None else {"labels": labels})
        np.savez(path, **arrays)


def _write_csv(file: TextIO, prediction: Prediction, labels: NDArray[np.int64] | None) -> None:
    writer = csv.writer(file)
    outputs = [f"output_{index}" for index in range(prediction.outputs.shape[1])]
    writer.writerow(outputs if labels is None else ["label", *outputs])
    for index, row in enumerate(prediction.outputs.tolist()):
        writer.writerow(row if labels is None else [labels[index], *row])
