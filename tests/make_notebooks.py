"""Make `docs/kaggle.ipynb` and `docs/gpu.ipynb`: one text, with the words of each machine.

    python tests/make_notebooks.py        (a minute or two on a CPU)

docs/kaggle.ipynb keeps what its cells print when they run with the tiny model on this machine.
"""

import os
import re
import sys
import tempfile
from pathlib import Path
from string import Template

import nbclient
import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

ROOT = Path(__file__).parents[1]

# Between two lines of ``` stands a cell of code; the rest is text.
TEXT = Template('''\
# GRPO for Gemma: $machine

As it stands, with `TINY = True`, this notebook trains the small model in the repository. Run it once like that: it takes
minutes, and shows that everything works on this machine. Then set `TINY = False`. Sessions 1, 2 and 3 are the same notebook
with another `SESSION` and `PREVIOUS`.

$begin
```
from pathlib import Path

SESSION = 1  # 1, 2 or 3
PREVIOUS = ""  # the run that this one continues, such as "$previous"
TINY = True  # the small model and made-up problems; False: what follows
PRESET, MODEL = $model
DATA, TEST = "openai/gsm8k", "openai/gsm8k:test"
HOURS = $hours  # of training, in this session
FLAGS = "$flags"  # more flags, the same in every session; "--max_steps 200" makes sessions shorter
SECRETS = $secrets  # secrets of the notebook: HF_TOKEN for a gated model, WANDB_API_KEY for --track wandb
CODE = "/kaggle/input/grpo-gemma"  # an attached input, or the URL of a git repository
WORK = "/kaggle/working"  # what is written here is kept$elsewhere
```
## Install

$install
```
if Path("../scripts/train.py").exists():  # docs/ of a clone, where everything is installed
    %cd -q ..
    WORK = "runs"
else:
    copy = "git clone -q" if "://" in CODE else "cp -r"
    !rm -rf /tmp/grpo-gemma && {copy} {CODE} /tmp/grpo-gemma
    %cd -q /tmp/grpo-gemma
    !pip install -q -e ".[$extras]"
```
$alone So the notebook does not use jax itself: each command below is a process of its own, which ends.
```
import sys

assert "jax" not in sys.modules, "this kernel has imported jax: restart it, then run all cells"
!python -c "import jax, sys; print('Python', sys.version.split()[0], 'jax', jax.__version__, jax.devices())"
```
## Train

$licence
```
import os

if TINY:
    PRESET, MODEL, DATA, TEST, SECRETS = "tiny", "models/tiny", "arithmetic", "", []
for name in SECRETS:
    $secret
RUN = f"{WORK}/session{SESSION}"
relay = f"--relay_from {PREVIOUS}" if PREVIOUS else ""
test = f"--data {TEST}" if TEST else ""
```
The first lines are the plan: steps, problems, a lower bound of the memory, the size of a checkpoint. Read them before you
leave. The first step compiles.
```
!python scripts/train.py {PRESET} --model_path {MODEL} --data {DATA} --run_dir {RUN} --session {SESSION} {relay} \\
    --max_hours {HOURS} {FLAGS}
```
A session that is not finished when its hours are over goes on in the next notebook, with the same `SESSION`.
```
import json

result = Path(RUN, "result.json")
finished = result.exists() and json.loads(result.read_text())["finished"]
print(f"The next notebook: SESSION = {SESSION + finished}, PREVIOUS = the place of {RUN} among its inputs")
!du -sh {RUN}
```
## Evaluate

Greedy answers and a vote over five temperatures, of the base and the trained model, on problems that were held out.
```
!python scripts/evaluate_consensus.py --model_path {RUN} {test} --rollout_tp 0
```
## Look

`report.html` is one offline page: curves, sessions, completions, and the arithmetic of their advantages and losses.
```
!python scripts/report.py {RUN}
```
```
from html import escape

from IPython.display import HTML, Image, display

for picture in sorted(Path(RUN).glob("*.png"), reverse=True):
    display(Image(picture))
for page in Path(RUN).glob("report.html"):
    display(HTML(f'<p>{page.name}</p><iframe srcdoc="{escape(page.read_text())}" width="100%" height="800"></iframe>'))
```
## Export

After the last session: the weights as a Hugging Face folder, for transformers, vLLM and other programs.
```
if SESSION == 3 and finished:
    !python scripts/export.py --model_path {RUN} --out {WORK}/exported
```
''')  # fmt: skip

WORDS = {
    "kaggle": dict(
        machine="Kaggle, TPU v5e-8",
        begin="""\
Choose the accelerator "TPU v5e-8", switch the internet on, attach the code as an input, and "Save & Run All". For the next
session copy the notebook, attach the output of this one as an input, and set `SESSION` and `PREVIOUS`. Six hours of training
and half an hour for installing, loading and evaluating are 6.5: three sessions fit 20 TPU hours a week. Limits and faults:
[kaggle.md](kaggle.md).

**No TPU and no Kaggle notebook has run this.** What is printed below comes from a CPU, with `TINY = True`, in a clone of the
repository.""",
        previous="/kaggle/input/NOTEBOOK/session1",
        model='"gemma2-2b-lora", "kaggle:google/gemma-2/flax/gemma2-2b-it"',
        hours="6",
        flags="",
        secrets="[]",
        elsewhere="",
        install="""\
pip replaces the image's jax by a newer one, and its libtpu by the one that belongs to that jax:
[what pip does](kaggle.md#what-pip-does).""",
        extras="tpu,kaggle",
        alone="One process at a time can hold the TPU.",
        licence="""\
`MODEL` is a handle `kaggle:OWNER/MODEL/FRAMEWORK/VARIATION`, the path of an attached input, or `hf:OWNER/NAME`. Accept the
licence of a Gemma first, on Kaggle or on Hugging Face.""",
        secret="""\
from kaggle_secrets import UserSecretsClient

    os.environ[name] = UserSecretsClient().get_secret(name)""",
    ),
    "gpu": dict(
        machine="one GPU, on Kaggle, Colab or a machine of your own",
        begin="""\
On Kaggle choose a GPU, switch the internet on, attach the code as an input, and "Save & Run All". On Colab mount your Drive,
and let `CODE` and `WORK` be folders in it. On a machine of your own open the notebook in `docs/` of a clone, after
`pip install -e ".[cuda,hub]"`; there one session can take as long as it needs (`HOURS = 0`).

**No GPU has run this.** With `TINY = True` it has run on a CPU. What fits, and what a T4 can do: [gpu.md](gpu.md).""",
        previous="/kaggle/input/NOTEBOOK/session1",
        model='"gemma3-1b-lora", "hf:google/gemma-3-1b-it"',
        hours="8",
        flags="--microbatches 4 --remat full",
        secrets='["HF_TOKEN"]',
        elsewhere='; on Colab "/content/drive/MyDrive/grpo"',
        install="""\
For a driver with CUDA 13 (`nvidia-smi` says which it has). With CUDA 12 write `".[cuda12,hub]"`.""",
        extras="cuda,hub",
        alone="jax reserves three quarters of the GPU's memory.",
        licence="`MODEL` is `hf:OWNER/NAME` or the path of a folder. Accept the licence of a Gemma first, on Hugging Face.",
        secret="""\
try:
        from kaggle_secrets import UserSecretsClient

        os.environ[name] = UserSecretsClient().get_secret(name)
    except ImportError:  # Colab
        from google.colab import userdata

        os.environ[name] = userdata.get(name)""",
    ),
}


def make(name: str) -> nbformat.NotebookNode:
    """The notebook `kaggle` or `gpu`, before it runs."""
    parts = re.split(r"^```\n", TEXT.substitute(WORDS[name]), flags=re.MULTILINE)
    cells = [(new_code_cell if i % 2 else new_markdown_cell)(part.strip()) for i, part in enumerate(parts) if part.strip()]
    for i, cell in enumerate(cells):
        cell.id = f"cell{i}"  # nbformat's are random
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return new_notebook(cells=cells, metadata={"kernelspec": kernel, "language_info": {"name": "python"}})


def execute(notebook: nbformat.NotebookNode, folder: Path) -> nbformat.NotebookNode:
    """Run it on one CPU device as if `folder` were a clone; the run lies in `folder`/runs. Raises CellExecutionError."""
    (folder / "docs").mkdir(parents=True, exist_ok=True)
    for name in ("scripts", "models"):
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    client = nbclient.NotebookClient(
        notebook, resources={"metadata": {"path": str(folder / "docs")}}, coalesce_streams=True, record_timing=False
    )
    return client.execute(env=environment)


def main() -> None:
    for name in WORDS:
        notebook = make(name)
        if name == "kaggle":
            with tempfile.TemporaryDirectory() as folder:
                execute(notebook, Path(folder))
        nbformat.write(notebook, ROOT / "docs" / f"{name}.ipynb")


if __name__ == "__main__":
    main()
