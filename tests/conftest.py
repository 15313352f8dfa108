"""Eight fake CPU devices for every test, and fixtures that several test files share."""

import atexit
import gc
import importlib.util
import mmap
import os
import shutil
import string
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path


def known_to_xla(flag: str) -> bool:
    """Whether the installed jaxlib has this flag; XLA ends the process for one that it does not know. A flag's name is a C
    string; names of former flags stay in the library without its zeros.
    """
    package = importlib.util.find_spec("jaxlib")
    assert package and package.origin
    with (Path(package.origin).parent / "libjax_common.so").open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ).find(f"\0{flag}\0".encode()) >= 0


os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"  # before anything imports jax
if known_to_xla("xla_cpu_use_fusion_emitters"):  # without them programs compile in half the time
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
if "PYTEST_XDIST_WORKER" not in os.environ:  # what one process of this session has compiled, the others load
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="grpo-tests-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"

import pytest  # noqa: E402 (jax reads the variables above)

pytest_plugins = ["training"]  # fixtures that the tests of training share


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="run every variant of the laws, on every mesh: minutes")


def pytest_terminal_summary(terminalreporter):
    """What one must read to follow an entry point, as test_imports.py has counted it."""
    for report in terminalreporter.stats.get("passed", []):
        for name, value in report.user_properties:
            if name == "closure":
                terminalreporter.write_line(f"to read {value}")


@pytest.hookimpl(tryfirst=True)  # before `-m long` selects
def pytest_collection_modifyitems(config, items):
    for item in items:
        if {"gemma270m", "browser", "tpu"} & set(item.fixturenames):  # real weights, Chromium, the TPU compiler
            item.add_marker(pytest.mark.long)
        if item.get_closest_marker("long") and not config.getoption("--long"):
            item.add_marker(pytest.mark.skip(reason="long: runs with --long"))


@pytest.fixture(scope="module", autouse=True)
def keep_the_cache():
    """A script that runs in this process makes jax store every program; the files after it count what is compiled."""
    import jax

    names = [f"jax_persistent_cache_min_{name}" for name in ("compile_time_secs", "entry_size_bytes")]
    former = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in former.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Each compiled program holds memory maps, of which Linux allows a process 65,530: when a file is done and many are taken,
    they are freed. Files that train the same model otherwise share its programs.
    """
    yield
    maps = Path("/proc/self/maps")
    if "jax" in sys.modules and (not maps.exists() or maps.read_bytes().count(b"\n") > 20_000):
        sys.modules["jax"].clear_caches()
        gc.collect()


@contextmanager
def few_optimizations():
    """Programs compile in half the time, without most optimizations."""
    import jax

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def quick_to_compile():
    with few_optimizations():
        yield


@pytest.fixture(scope="module")
def mesh(quick_to_compile):
    """One device as the mesh of a whole test file."""
    import jax

    from models.sharding import make_mesh

    mesh = make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        yield mesh


@pytest.fixture(scope="session")
def gemma270m() -> Path:
    """Folder of the real Gemma 3 270M, with both tokenizer files, named by GEMMA3_270M; skips without it."""
    if "GEMMA3_270M" not in os.environ:
        pytest.skip("GEMMA3_270M is not set")
    return Path(os.environ["GEMMA3_270M"])


@pytest.fixture
def small_tokenizer_folder(tmp_path) -> Path:
    """Folder with a tokenizer.json in Gemma's style: single characters, bytes, and three merged pieces."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    control = ["<pad>", "<eos>", "<bos>", "<unk>", "<unused0>", "<start_of_turn>", "<end_of_turn>"]
    characters = ["▁", "\n", *string.digits, *string.ascii_letters, *string.punctuation]
    pieces = [*control, *(f"<0x{byte:02X}>" for byte in range(256)), *characters, "mo", "▁t", "an"]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=[("m", "o"), ("▁", "t"), ("a", "n")],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    # As in Google's file: every control piece is matched in text, but <unused0> is not flagged as special.
    tokenizer.add_special_tokens([AddedToken(p, normalized=False) for p in control if p != "<unused0>"])
    tokenizer.add_tokens([AddedToken("<unused0>", normalized=False)])
    # As in Google's file too: whoever encodes with the library's defaults gets a BOS.
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    folder = tmp_path / "small"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
