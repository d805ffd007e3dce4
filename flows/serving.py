"""What MLflow serves: an exported network behind a table of images. A copy goes into each model.

It needs mlflow, numpy, onnxruntime and pillow, and the folder crnn that lies beside it.
"""

import base64
import binascii
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc.model import PythonModel
from PIL import Image

from crnn.data.images import decode
from crnn.errors import DataError
from crnn.reading import load_exported, read_images

NETWORK = "network"
"""Name of the artifact that is the ONNX file."""

IMAGE, PATH = "image", "path"
"""Columns of a request: the bytes of an image file in base64, or the path of one."""

MAX_IMAGES = 1000
"""Of a request."""

MAX_BYTES = 20_000_000
"""Of an image file."""


class LineReader(PythonModel):
    """Reads lines of text."""

    def load_context(self, context: Any) -> None:
        """Open the network. One thread: a server answers several requests at once."""
        self._reader = load_exported(Path(context.artifacts[NETWORK]), threads=1)

    def predict(
        self, context: Any, model_input: pandas.DataFrame, params: dict[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """Text and confidence of every image.

        Args:
            context: Of MLflow.
            model_input: Has the column image, or path, or both, of which each row has one.
            params: None are known.

        Raises:
            MlflowException: A request that cannot be served; the server answers 400.
        """
        # One by one: as they come, a thousand may take more memory than there is.
        images = (_open(row) for row in _rows(model_input))
        return [
            {"text": read.text, "confidence": round(read.confidence, 6)}
            for read in read_images(self._reader, images)
        ]


def _rows(table: pandas.DataFrame) -> Sequence[dict[str, Any]]:
    """Rows of a request, none of them more than numbers or strings."""
    if len(table) > MAX_IMAGES:
        raise _refused(f"at most {MAX_IMAGES} images a request, not {len(table)}")
    if not {IMAGE, PATH} & set(table.columns):
        raise _refused(f"a request has a column {IMAGE} (base64) or {PATH}, not {[*table.columns]}")
    rows: Sequence[dict[str, Any]] = table.to_dict("records")
    return rows


def _open(row: dict[str, Any]) -> Image.Image:
    image, path = (row.get(name) for name in (IMAGE, PATH))
    given = [value for value in (image, path) if isinstance(value, str) and value]
    if len(given) != 1:
        raise _refused(f"a row has either {IMAGE} or {PATH}, and a string there")
    try:
        return decode(_bytes_of_file(path) if given[0] is path else _bytes(given[0]))
    except DataError as error:
        raise _refused(f"image {given[0][:40]!r} cannot be read: {error}") from error


def _bytes(text: str) -> bytes:
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"not base64 ({error})") from error
    if len(data) > MAX_BYTES:
        raise DataError(f"an image file has at most {MAX_BYTES:,} bytes")
    return data


def _bytes_of_file(path: str) -> bytes:
    try:
        if Path(path).stat().st_size > MAX_BYTES:
            raise DataError(f"an image file has at most {MAX_BYTES:,} bytes")
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise DataError(getattr(error, "strerror", None) or str(error)) from error


def _refused(message: str) -> MlflowException:
    return MlflowException(message, error_code=INVALID_PARAMETER_VALUE)


set_model(LineReader())
