"""Recognition with the model of the rapidocr wheel, on pictures drawn here."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from curate.errors import WeightsError
from curate.score.text_density import TextDetector
from curate.score.text_recognition import TextReader, script_of
from tests.score.onnx_bytes import node, write_onnx


@pytest.fixture(scope="module")
def reader() -> TextReader:
    return TextReader.from_file()


def written(*lines: str, turned: bool = False) -> np.ndarray:
    picture = np.full((400, 700, 3), 250, dtype=np.uint8)
    for i, line in enumerate(lines):
        cv2.putText(picture, line, (30, 80 + 90 * i), cv2.FONT_HERSHEY_SIMPLEX, 1.6, (10, 10, 10), 3, cv2.LINE_AA)
    return np.ascontiguousarray(np.rot90(picture, -1)) if turned else picture


def test_reads_what_is_written(reader: TextReader) -> None:
    """A wrong alphabet offset, channel order or crop reads other letters, or none."""
    picture = written("GRAND OPENING", "Saturday 12 June")
    lines = reader.read(picture, TextDetector.from_file().detect([picture])[0])
    assert {"".join(line.split()) for line in lines} == {"GRANDOPENING", "Saturday12June"}
    got = reader([picture, np.full((100, 100, 3), 128, dtype=np.uint8)])
    assert got["text_chars"].tolist() == [26, 0]
    assert got["text_script"] == ["Latn", None]
    assert got["text_density_read"][0] > got["text_density_read"][1] == 0


def test_turned_lines_are_read(reader: TextReader) -> None:
    """Vertical regions are turned before reading, as rapidocr does."""
    got = reader([np.ascontiguousarray(np.rot90(written("GRAND OPENING"), -1))])
    assert got["text_chars"][0] >= 10


def test_does_not_depend_on_company(reader: TextReader) -> None:
    """Padding to the widest line of a batch would change a line's reading with its company."""
    pictures = [written("one"), written("two words", "a much longer line of text"), written("three")]
    together = reader(pictures)["text_chars"].tolist()
    assert together == [int(reader([picture])["text_chars"][0]) for picture in pictures]


def test_scripts() -> None:
    """Kana makes Chinese characters Japanese; digits and signs have no script."""
    assert script_of("Hello 東") == "Latn"
    assert script_of("東京の夜") == "Jpan"
    assert script_of("北京故宫") == "Hani"
    assert script_of("Красная") == "Cyrl"
    assert script_of("12 %") is None
    assert script_of("") is None


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 5000, 3), (30, 40)])
def test_odd_pictures(reader: TextReader, shape: tuple[int, ...]) -> None:
    """Extreme shapes and greyscale are pictures too; an empty batch has no rows."""
    assert reader([np.zeros(shape, dtype=np.uint8)])["text_chars"].tolist() == [0]
    assert all(len(values) == 0 for values in reader([]).values())


def test_a_model_without_alphabet_is_refused(tmp_path: Path) -> None:
    """A recogniser of another layout would decode to nonsense."""
    path = write_onnx(tmp_path / "m.onnx", [node("Identity", ["x"], ["y"])], {"x": [1, 3]}, {"y": [1, 3]}, {})
    with pytest.raises(WeightsError, match="no PP-OCR recogniser"):
        TextReader.from_file(path)
