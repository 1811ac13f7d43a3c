"""Pictures and tables: right size, right pixels, nothing half-written."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from jaxdiff import eval as ev


def test_image_grid_is_a_png_of_the_right_size_and_content(tmp_path):
    images = -np.ones((6, 8, 8, 1), np.float32)
    images[4, 2, 3] = 1.0  # row 1, column 1 of a 2 x 3 grid
    path = ev.image_grid(images, 2, 3, tmp_path / "deep" / "grid.png", scale=5, gap=2)
    with Image.open(path) as picture:
        assert picture.format == "PNG" and picture.size == (3 * 42 + 2, 2 * 42 + 2)
        pixels = np.asarray(picture)
    top, left = 2 + 42 + 2 * 5, 2 + 42 + 3 * 5
    assert (pixels[top : top + 5, left : left + 5] == 255).all()
    assert (pixels == 255).all(axis=-1).sum() == 25
    assert [p.name for p in path.parent.iterdir()] == ["grid.png"]


def test_small_images_are_enlarged_until_visible_and_large_ones_are_not():
    assert ev.tile(np.zeros((1, 8, 8)), 1, 1, gap=0).shape == (48, 48, 3)
    assert ev.tile(np.zeros((1, 28, 28, 3)), 1, 1, gap=0).shape == (56, 56, 3)
    assert ev.tile(np.zeros((1, 64, 64, 3)), 1, 1, gap=0).shape == (64, 64, 3)


def test_tile_clips_and_scales():
    grid = ev.tile(np.array([-9.0, -1.0, 0.0, 0.5, 1.0, 9.0]).reshape(6, 1, 1), 1, 6, scale=1, gap=0)
    np.testing.assert_array_equal(grid[0, :, 0], [0, 0, 128, 191, 255, 255])
    assert ev.tile(np.full((1, 1, 1), 0.25), 1, 1, low=0, high=1, scale=1, gap=0)[0, 0, 0] == 64


def test_loss_curves_and_toy_panels_are_readable_pngs(tmp_path):
    steps = np.arange(300)
    curves = {"loss": (steps, np.exp(-steps / 50) + 0.01), "held out": (steps[::50], np.full(6, np.nan))}
    loss = ev.loss_curves(curves, tmp_path / "loss.png", title="a title")
    generator = np.random.default_rng(0)
    points, paths = generator.normal(size=(500, 2)), np.cumsum(generator.normal(size=(20, 30, 2)), axis=0) / 10
    toy = ev.toy_panels(points, points + 0.1, paths, tmp_path / "toy.png")
    for path, size in ((loss, (768, 432)), (toy, (1152, 420))):
        with Image.open(path) as picture:
            assert picture.size == size
            assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 50


def test_pictures_do_not_touch_pyplot_or_need_a_display(tmp_path):
    code = (
        "import sys; from jaxdiff import eval as ev; assert 'matplotlib' not in sys.modules and 'PIL' not in sys.modules;"
        f"ev.loss_curves({{'loss': ([1, 2], [3.0, 4.0])}}, {str(tmp_path / 'a.png')!r});"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_table_aligns_numbers_right_and_words_left():
    rows = [["frechet", 0.123456, 360], ["nearest train ratio", 12.0, None], ["flag", np.float32(1e-7), True]]
    expected = [
        "metric                  value  count",
        "-------------------  --------  -----",
        "frechet                 0.123    360",
        "nearest train ratio      12.0      -",
        "flag                 1.00e-07    yes",
    ]
    assert ev.format_table(rows, ["metric", "value", "count"], digits=3).splitlines() == expected
    assert ev.format_table([{"a": 1, "b": 2.5}, {"a": 10}]).splitlines() == [
        " a      b",
        "--  -----",
        " 1  2.500",
        "10      -",
    ]
    assert ev.format_table([]) == ""
    assert [ev.format_number(v) for v in (float("nan"), 123456.0, 1234.0, 0.0)] == [
        "nan",
        "1.235e+05",
        "1234",
        "0.000",
    ]


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda p: ev.image_grid(np.zeros((3, 8, 8)), 2, 2, p), "3 images; a grid of 2 x 2 needs 4"),
        (lambda p: ev.image_grid(np.zeros((4, 8, 8, 2)), 2, 2, p), r"expected \(N, H, W\)"),
        (lambda p: ev.image_grid(np.full((4, 8, 8), np.nan), 2, 2, p), "NaN"),
        (lambda p: ev.image_grid(np.zeros((4, 8, 8)), 0, 2, p), "rows: 0"),
        (lambda p: ev.image_grid(np.zeros((4, 8, 8)), 2, 2, p, low=1, high=1), "high: 1"),
        (lambda p: ev.loss_curves({"loss": ([1], [np.nan])}, p), "no finite value"),
        (lambda p: ev.loss_curves({"loss": ([1, 2], [1.0])}, p), "'loss'"),
        (lambda p: ev.toy_panels(np.zeros((3, 2)), np.zeros((3, 3)), np.zeros((2, 3, 2)), p), "samples: shape"),
        (lambda p: ev.format_table([[1, 2], [3]]), r"lengths \[1, 2\]"),
    ],
)
def test_bad_input_writes_nothing(call, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        call(tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []
