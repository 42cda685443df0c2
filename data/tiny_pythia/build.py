"""Writes the tiny base model: a GPT-NeoX config and a byte-level BPE tokenizer trained on the task; no weights.

    python data/tiny_pythia/build.py             # rewrites the committed files
    python data/tiny_pythia/build.py --out DIR   # the same files somewhere else

The vocabulary has its own <|pad|>, never equal to <|endoftext|>, so that stopping can be learned.
"""

import argparse
import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPTNeoXConfig, PreTrainedTokenizerFast

VOCAB_SIZE = 1024  # of the model; the tokenizer stops earlier, when no pair is left to merge
EOS, PAD = "<|endoftext|>", "<|pad|>"

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write into")
    out = parser.parse_args().out
    task = Path(__file__).parents[1] / "tldr_mini"
    files = [task / "reference" / name for name in ("train.jsonl", "shifted.jsonl")]
    rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=[EOS, PAD], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator((row["prompt"] + row["completion"] for row in rows), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS, pad_token=PAD, model_max_length=512)
    tokenizer.save_pretrained(out)
    GPTNeoXConfig(
        architectures=["GPTNeoXForCausalLM"],
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=512,
        rotary_pct=0.25,
        initializer_range=0.12,  # about 1/sqrt(width); with Pythia's 0.02 the copying circuits appear too late,
        use_parallel_residual=True,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    ).save_pretrained(out)
    print(f"{out}: {len(tokenizer)} tokens, EOS {tokenizer.eos_token_id}, PAD {tokenizer.pad_token_id}")
