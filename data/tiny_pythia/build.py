"""Writes the tiny base model: a GPT-NeoX config and a byte-level BPE tokenizer trained on the task; no weights.

    python data/tiny_pythia/build.py             # rewrites the committed files
    python data/tiny_pythia/build.py --out DIR   # the same files somewhere else
    python data/tiny_pythia/build.py --out DIR --dataset NAME --vocab-size 4096 --width 192 --layers 4   # for other data

The vocabulary has its own <|pad|>, never equal to <|endoftext|>, so that stopping can be learned.
"""

import argparse
import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPTNeoXConfig, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from plumbing.rows import load_rows

EOS, PAD = "<|endoftext|>", "<|pad|>"

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write into")
    parser.add_argument("--dataset", help="text for the tokenizer: its train split, in any shape; default: the task")
    parser.add_argument("--vocab-size", type=int, default=1024, help="of the model; the tokenizer may stop earlier")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    args = parser.parse_args()
    task = Path(__file__).parents[1] / "tldr_mini"
    files = [task / "reference" / name for name in ("train.jsonl", "shifted.jsonl")]
    rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    if args.dataset:
        rows = load_rows(args.dataset, "", ("train",), ("prompt", "completion"), tokenizer_path="")["train"]

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=args.vocab_size, special_tokens=[EOS, PAD], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator((row["prompt"] + row["completion"] for row in rows), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS, pad_token=PAD, model_max_length=512)
    tokenizer.save_pretrained(args.out)
    GPTNeoXConfig(
        architectures=["GPTNeoXForCausalLM"],
        vocab_size=args.vocab_size,
        hidden_size=args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        intermediate_size=4 * args.width,
        max_position_embeddings=512,
        rotary_pct=0.25,
        initializer_range=round(args.width**-0.5, 2),  # with Pythia's 0.02 the copying circuits appear too late
        use_parallel_residual=True,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    ).save_pretrained(args.out)
    print(f"{args.out}: {len(tokenizer)} tokens, EOS {tokenizer.eos_token_id}, PAD {tokenizer.pad_token_id}")
