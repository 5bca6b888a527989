"""Eight fake CPU devices, strict shapes."""

import gc
import mmap
import os
from pathlib import Path

import jax
import jaxlib
import pytest
from absl import flags

# Compiling is most of the time of these small programs: LLVM need not polish them, and XLA's
# older emitters of loops take less than half the time, as one module rather than many.
_QUICK = {
    "xla_backend_optimization_level": "0",
    "xla_cpu_use_fusion_emitters": "false",
    "xla_cpu_parallel_codegen_split_count": "1",
}


def _known(flag):
    """Whether this jaxlib has it: XLA ends the process at a flag that it does not know."""
    if flag == "xla_cpu_use_fusion_emitters" and jaxlib.version.__version_info__ >= (0, 11):
        return False  # the older emitters are gone, the name is still in the library
    for path in Path(jaxlib.__file__).parent.glob("*.so"):
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as text:
            if text.find(flag.encode()) >= 0:
                return True
    return False


os.environ.setdefault("MPLBACKEND", "agg")
if "XLA_FLAGS" not in os.environ:
    os.environ["XLA_FLAGS"] = " ".join(f"--{k}={v}" for k, v in _QUICK.items() if _known(k))
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
flags.FLAGS.mark_as_parsed()


# Files that take longest come first, so that no process is left alone with one at the end.
_LONGEST = (
    *("test_resume", "test_train", "test_parity", "test_convert", "test_processes"),
    *(
        "test_evaluate",
        "test_judge",
        "test_sample",
        "test_docs",
        "test_cli",
        "test_front_door",
        "test_api",
    ),
    *("test_tune", "test_stop", "test_bench", "test_ema", "test_earlier_versions", "test_report"),
)


def pytest_configure(config):
    """Programs are compiled once for all tests, test processes and commands they start."""
    options = {
        "jax_compilation_cache_dir": str(config.cache.mkdir("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in options.items():
        os.environ[name.upper()] = str(value)
        jax.config.update(name, value)


def pytest_collection_finish():
    """A collection after every 700 new objects is a quarter of the time that tracing takes."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 10, 10)


def pytest_collection_modifyitems(config, items):
    """Tests marked `bits` are run by test_bits.py, by programs as users compile them; those marked
    `long` by `make long`."""
    if not config.option.markexpr:
        left = [i for i in items if i.get_closest_marker("bits") or i.get_closest_marker("long")]
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in left]
    order = {name: place for place, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(scope="module", autouse=True)
def _small_heap():
    """What a file traced and compiled is let go: in gigabytes of it everything takes longer."""
    yield
    jax.clear_caches()


@pytest.fixture
def key():
    return jax.random.key(0)


def _trained(folder, variant=""):
    from tests import commands

    code, out, err = commands.train(folder, variant=variant)
    assert code == 0, err
    return folder, out, err


@pytest.fixture(scope="session")
def small_training(tmp_path_factory):
    """A model of 2 levels, trained for a moment, and what was said: (folder, stdout, stderr)."""
    return _trained(tmp_path_factory.mktemp("small") / "run")


@pytest.fixture(scope="session")
def small_run(small_training):
    """The folder of it. Tests read it and leave it as it is."""
    return small_training[0]


@pytest.fixture(scope="session")
def small_sit(tmp_path_factory):
    """The same of one level; also left as it is."""
    return _trained(tmp_path_factory.mktemp("sit") / "run", variant=":sit")[0]
