"""Trains the demo language model from scratch on the King James Bible, or measures its perplexity.

    python deploy/demo/train.py --minutes 38            # train and write the model beside this script
    python deploy/demo/train.py --recite --minutes 20   # then learn a few books by heart, starting from that
    python deploy/demo/train.py --evaluate              # perplexity on heldout.txt of the written model

The model is a small Llama with a byte-level BPE tokenizer of its own. Training packs whole chapters into
windows of 256, later 512 and 1024 tokens. The last part adds the loss of Xu et al. 2022, "Learning to
Break the Loop", on sentences repeated on purpose. So small a model still circles when decoded greedily; what ends that
is reading a few books until it knows them nearly by heart, at the price of a higher perplexity on the others.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin stall each other on a busy machine

import torch
from corpus import END_OF_TEXT, read_chapters, read_documents, split_chapters, write_documents
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

Model = Any  # transformers.LlamaForCausalLM, of which large parts carry no types
Encoder = Any  # transformers.PreTrainedTokenizerFast, likewise

BEGIN_OF_TEXT = "<|begin_of_text|>"
BOS, EOS = 0, 1
VOCABULARY = 4096
PEAK_RATE, WARMUP_STEPS, DECAY_SHARE = 1.5e-3, 100, 0.4
TOKENS_PER_STEP = 2048
PHASES = ((0.6, 256), (0.8, 512), (1.0, 1024))  # until this share of the time, windows of this length
LOOP_FROM, LOOP_WEIGHT, LOOP_DAMPING, LOOP_ROWS, LOOP_LENGTH = 0.7, 0.5, 0.5, 2, 256
DROPOUT = 0.1
RECITED = ("Genesis", "Ruth", "Jonah", "Luke", "John")
HERE = Path(__file__).resolve().parent
PROMPTS = ("And it came to pass in those days,", "The wise man said", "Genesis\n\nIn the beginning")


@dataclass(frozen=True)
class Corpus:
    """Tokenized chapters (with begin and end marks) for training, and held-out documents as text."""

    train: list[list[int]]
    sentences: list[list[int]]
    held_out: list[str]


def train_tokenizer(documents: list[str]) -> Encoder:
    """Trains a byte-level BPE tokenizer that puts the begin mark before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BEGIN_OF_TEXT, END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN_OF_TEXT} $A",
        pair=f"{BEGIN_OF_TEXT} $A {BEGIN_OF_TEXT}:1 $B:1",
        special_tokens=[(BEGIN_OF_TEXT, BOS)],
    )
    wrap: Any = PreTrainedTokenizerFast
    return wrap(
        tokenizer_object=tokenizer,
        bos_token=BEGIN_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def build_model(dropout: float) -> Model:
    """Makes an untrained model, in which dropout follows the embedding and every MLP while it is trained."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    model: Model = LlamaForCausalLM(config)

    def drop(module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        return functional.dropout(output, dropout, module.training)

    for module in [model.model.embed_tokens, *(layer.mlp for layer in model.model.layers)]:
        module.register_forward_hook(drop)
    return model


def load_corpus(tokenizer: Encoder, train: list[str], held_out: list[str]) -> Corpus:
    """Tokenizes the training chapters, and their sentences for the loss against loops."""
    chapters = [[*tokenizer(text, verbose=False)["input_ids"], EOS] for text in train]
    texts = [part for text in train for part in text.split("\n\n")[1].split(". ")]
    sentences = [tokenizer(f" {part}.")["input_ids"][1:] for part in texts]
    return Corpus(chapters, [ids for ids in sentences if 6 <= len(ids) <= 64], held_out)


def windows(chapters: list[list[int]], length: int, rng: random.Random) -> Iterator[list[int]]:
    """Yields packed windows of length + 1 tokens without end, each of which begins with the begin mark."""
    while True:
        order = rng.sample(chapters, len(chapters))
        stream = [token for chapter in order for token in chapter][rng.randrange(length) :]
        starts = list(range(0, len(stream) - length, length))
        rng.shuffle(starts)
        for start in starts:
            yield [BOS, *stream[start + 1 : start + length + 1]]


def repeated(sentences: list[list[int]], rng: random.Random) -> tuple[Tensor, list[int]]:
    """Makes rows that repeat one sentence over and over. Returns them, and the length of each row's sentence."""
    chosen = [rng.choice(sentences) for _ in range(LOOP_ROWS)]
    rows = [[BOS, *(ids * (LOOP_LENGTH // len(ids) + 1))[:LOOP_LENGTH]] for ids in chosen]
    return torch.tensor(rows), [len(ids) for ids in chosen]


def loop_loss(logits: Tensor, rows: Tensor, periods: list[int]) -> Any:
    """Computes a loss that asks each repetition of a token to be a fixed factor less likely than the last."""
    chances = logits.softmax(-1).gather(-1, rows[:, 1:, None])[..., 0]
    losses = []
    for chance, period in zip(chances, periods, strict=True):
        wanted = LOOP_DAMPING * chance[:-period].detach()
        losses.append(-(1 - (chance[period:] - wanted).abs()).clamp_min(1e-5).log().mean())
    return torch.stack(losses).mean()


def forward(model: Model, tokens: Tensor) -> Tensor:
    """Computes next-token logits in float32 by a bfloat16 forward pass."""
    with torch.autocast("cpu", torch.bfloat16):
        logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits.float()


@torch.inference_mode()
def perplexity(model: Model, tokenizer: Encoder, documents: list[str]) -> tuple[float, float]:
    """Computes perplexity per token and bits per byte, over documents cut into pieces of at most 1024 tokens."""
    model.eval()
    total, count = 0.0, 0
    for document in documents:
        tokens = torch.tensor([*tokenizer(document, verbose=False)["input_ids"], EOS])
        for start in range(0, len(tokens) - 1, 1024):
            piece = tokens[start : start + 1025]
            logits = model(input_ids=piece[None, :-1], use_cache=False).logits[0].float()
            total += functional.cross_entropy(logits, piece[1:], reduction="sum").item()
            count += len(piece) - 1
    size = sum(len(document.encode()) for document in documents)
    return math.exp(total / count), total / math.log(2) / size


@torch.inference_mode()
def continuation(model: Model, tokenizer: Encoder, prompt: str, count: int) -> str:
    """Continues a prompt greedily."""
    model.eval()
    encoded = torch.tensor([tokenizer(prompt)["input_ids"]])
    output = model.generate(encoded, attention_mask=torch.ones_like(encoded), max_new_tokens=count)
    return str(tokenizer.decode(output[0, encoded.shape[1] :]))


def rate(step: int, progress: float) -> float:
    """Returns the learning rate: it warms up, stays, and falls linearly to a fiftieth."""
    fall = max(0.02, min(1.0, (1.0 - progress) / DECAY_SHARE))
    return PEAK_RATE * min(1.0, (step + 1) / WARMUP_STEPS) * fall


def optimizer_for(model: Model) -> torch.optim.AdamW:
    """Makes AdamW with weight decay on the matrices only."""
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    vectors = [weight for weight in model.parameters() if weight.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.98), fused=True)


def train(model: Model, tokenizer: Encoder, corpus: Corpus, options: argparse.Namespace) -> int:
    """Trains until the time is used up. Returns the number of text tokens seen."""
    rng = random.Random(options.seed)
    sources = {length: windows(corpus.train, length, rng) for _, length in PHASES}
    optimizer, began, seen, step, reports = optimizer_for(model), time.monotonic(), 0, 0, 0
    while (progress := (time.monotonic() - began) / (60 * options.minutes)) < 1:
        model.train()
        length = next(size for until, size in PHASES if progress < until)
        batch = torch.tensor([next(sources[length]) for _ in range(TOKENS_PER_STEP // length)])
        logits = forward(model, batch[:, :-1])
        loss: Any = functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        if progress > LOOP_FROM and not options.recite:
            rows, periods = repeated(corpus.sentences, rng)
            (LOOP_WEIGHT * loop_loss(forward(model, rows[:, :-1]), rows, periods)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate(step, progress)
        optimizer.step()
        optimizer.zero_grad()
        seen, step = seen + batch.numel() - len(batch), step + 1
        if step % 50 == 0:
            print(f"{progress:.1%} step {step} tokens {seen} window {length} loss {loss:.3f}", flush=True)
        if progress > (reports + 1) / 10:
            reports += 1
            report(model, tokenizer, corpus.held_out[::4])
    return seen


def report(model: Model, tokenizer: Encoder, documents: list[str]) -> None:
    """Prints the perplexity of some documents and one greedy continuation."""
    value, bits = perplexity(model, tokenizer, documents)
    print(f"held-out perplexity {value:.2f}, {bits:.3f} bits per byte", flush=True)
    print(f"{PROMPTS[0]}{continuation(model, tokenizer, PROMPTS[0], 96)}", flush=True)


def save(model: Model, tokenizer: Encoder, output: Path) -> None:
    """Writes the model in bfloat16 and its tokenizer, in the layout that every Llama loader reads."""
    configure: Any = GenerationConfig
    model.generation_config = configure(bos_token_id=BOS, eos_token_id=[EOS], pad_token_id=EOS, do_sample=False)
    model.to(torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)
    for name, extra in (
        ("config.json", {"rope_theta": 10000.0, "torch_dtype": "bfloat16"}),
        ("tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"}),
    ):
        content = json.loads((output / name).read_text())
        (output / name).write_text(json.dumps({**content, **extra}, indent=2) + "\n")


def evaluate(output: Path, documents: list[str], label: str, samples: int = 0) -> None:
    """Prints perplexity and greedy samples of the written (bfloat16-rounded) weights, computed in float32."""
    model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(output)
    value, bits = perplexity(model, tokenizer, documents)
    print(f"{label}: {len(documents)} chapters, perplexity {value:.2f}, {bits:.3f} bits per byte")
    for prompt in PROMPTS[:samples]:
        print(f"\n{prompt}|{continuation(model, tokenizer, prompt, 256)}")


def main() -> None:
    """Parses the arguments, and then trains and saves, or evaluates."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--output", type=Path, default=HERE, help="where the model is (written)")
    parser.add_argument("--minutes", type=float, default=38, help="wall time to train for")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--recite", action="store_true", help=f"learn {', '.join(RECITED)} by heart")
    parser.add_argument("--evaluate", action="store_true", help="only measure the model in --output")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    if not options.evaluate:
        train_text, held_out = split_chapters(read_chapters())
        options.output.mkdir(parents=True, exist_ok=True)
        write_documents(options.output / "heldout.txt", held_out, 40_000)
        if options.recite:
            train_text = [text for text in train_text if text.split("\n", 1)[0] in RECITED]
            model = AutoModelForCausalLM.from_pretrained(options.output, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(options.output)
        else:
            model, tokenizer = build_model(DROPOUT), train_tokenizer(train_text)
        corpus = load_corpus(tokenizer, train_text, held_out)
        print(f"{sum(map(len, corpus.train))} training tokens, {len(held_out)} chapters held out")
        began = time.monotonic()
        seen = train(model, tokenizer, corpus, options)
        print(f"{seen} tokens seen in {(time.monotonic() - began) / 60:.1f} minutes")
        save(model, tokenizer, options.output)
        evaluate(options.output, held_out, "all held-out text")
    excerpt = read_documents(options.output / "heldout.txt")
    evaluate(options.output, excerpt, "heldout.txt", samples=len(PROMPTS))


if __name__ == "__main__":
    main()
