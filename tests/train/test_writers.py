import numpy as np
from PIL import Image

from ppflow_jax.data.save import save_grid, to_uint8
from ppflow_jax.train.metrics_log import MetricWriter, read_metrics


def test_metrics_after_the_restored_step_are_dropped(tmp_path):
    writer = MetricWriter(tmp_path, 0)
    for step in range(1, 6):
        writer.write(step, {"loss": 1.0 / step})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # cut off by a kill
    MetricWriter(tmp_path, 3).close()
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_rounding_is_that_of_adm():
    x = np.float32([-1.5, -1, 0, 0.5, 1, 2]).reshape(1, 1, 6, 1)
    assert to_uint8(x, "pixels").ravel().tolist() == [0, 0, 128, 191, 255, 255]
    assert to_uint8(np.zeros((1, 2, 2, 4), np.float32), "latents").shape == (1, 2, 2, 3)


def test_grid_is_filled_row_by_row(tmp_path):
    images = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1).repeat(64, 1).repeat(64, 2) * 50
    save_grid(tmp_path / "grid.png", images, columns=3)
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (2 * 66, 3 * 66)
    assert grid[33::66, 33::66].tolist() == [[0, 50, 100], [150, 200, 0]]
    assert not list(tmp_path.glob(".*"))
