"""Makes data/tldr_mini/base, the pretrained model that the embedded task starts from: 3 layers, trained on forum posts.

    python data/tldr_mini/pretrain.py              # rewrites the committed folder, a minute and a half
    python data/tldr_mini/pretrain.py --out DIR    # the same somewhere else

The paper starts from Pythia, which has read such posts. Here the posts with their posters' own sloppy TL;DRs are written by
generate.py --forum, and sft.py learns them from random weights.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
KEPT = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "base", help="folder to write into")
    out = parser.parse_args().out.resolve()
    with tempfile.TemporaryDirectory() as folder:
        forum, shapes = ["--dataset", f"{folder}/forum"], ["--layers", "3"]
        for script, *flags in (
            [HERE / "generate.py", "--forum", "--out", folder],
            [ROOT / "data/tiny_pythia/build.py", "--out", f"{folder}/shape", *forum, *shapes],
            [ROOT / "sft.py", *forum, "--base-model", f"{folder}/shape", "--output-dir", f"{folder}/base"]
            + ["--num-epochs", "7", "--learning-rate", "4e-3", "--run-name", "base"],
        ):
            subprocess.run([sys.executable, script, *flags], cwd=folder, check=True)
        out.mkdir(parents=True, exist_ok=True)
        for name in KEPT:
            shutil.copy(f"{folder}/base/{name}", out / name)
    print(f"{out}: {sum((out / name).stat().st_size for name in KEPT) / 1e6:.1f} MB")
