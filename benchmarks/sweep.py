"""Every prompt at every strength: dsteer's sweep, the usual way, and the limit.

Run by hand:  python benchmarks/sweep.py [PROMPTS] [--repeats 3]
On a GPU:     python benchmarks/sweep.py [PROMPTS] --device cuda --shape 1b --dtype bfloat16

The model is a Llama of the named shape with random weights; the prompts are the first 32 of an
hh-rlhf file, tokenised by a byte-level BPE learned from that file's prompts on the spot. A random
vector acts on the middle block at 9 strengths; every text has 48 new tokens, greedy.

- *dsteer*: ``dsteer.sweep``, all strengths in shared batches;
- *usual*: left-padded ``generate`` of all prompts with a hook that adds λv, one strength at a time;
- *limit*: the linear layers alone, on the tokens that have to be computed: a prompt's up to the
  steered block once, behind it once a strength, and every new token.

Methods take turns, so that a change of the machine's pace hits both; medians are printed. A text
that differs is counted, and a tie is a difference that begins where the usual way's two largest
logits lie within 1e-4 of each other.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import dsteer
from dsteer.data import load_preferences
from dsteer.data.tokens import Encoded, encode
from dsteer.models.tiny import build_tokenizer

SHAPES = {
    "small": {
        "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 688,
        "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4,
    },
    "1b": {
        "vocab_size": 32_000, "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
    },
}  # fmt: skip
STRENGTHS = (-2.0, -1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0, 2.0)
NEW_TOKENS = 48
TIE = 1e-4
PROMPTS = Path(__file__).parents[2] / "shared" / "data" / "hh-rlhf-harmless-base-test.jsonl.gz"


class Subject:
    """One model, the prompts and the vector, which the benchmark of guidance has too."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.device = torch.device(arguments.device)
        shape = SHAPES[arguments.shape]
        pairs = load_preferences(str(arguments.prompts))
        self.tokenizer = build_tokenizer((str(pair.prompt) for pair in pairs), shape["vocab_size"])
        texts = [str(pair.prompt) for pair in pairs[: arguments.n]]
        self.encoded: list[Encoded] = encode(self.tokenizer, texts)
        torch.manual_seed(0)
        # Weights of this size keep the two largest logits apart, as a trained model's are.
        config = LlamaConfig(
            **shape, max_position_embeddings=2048, bos_token_id=None, eos_token_id=None,
            pad_token_id=0, initializer_range=2 * shape["hidden_size"] ** -0.5,
        )  # fmt: skip
        self.model = LlamaForCausalLM(config).to(self.device, getattr(torch, arguments.dtype))
        self.model.eval()
        self.tokenizer.eos_token = None  # every text has all its tokens
        self.block = shape["num_hidden_layers"] // 2
        generator = torch.Generator().manual_seed(1)
        v = torch.randn(shape["hidden_size"], generator=generator)
        self.vector = dsteer.SteeringVector(v / v.norm() * 4, site=f"resid_post.{self.block}")

    def padded(self) -> tuple[Tensor, Tensor]:
        """Ids and mask, padded on the left."""
        width = max(len(item.ids) for item in self.encoded)
        ids = torch.zeros(len(self.encoded), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, item in enumerate(self.encoded):
            ids[row, width - len(item.ids) :] = torch.tensor(item.ids)
            mask[row, width - len(item.ids) :] = 1
        return ids.to(self.device), mask.to(self.device)


class Bench(Subject):
    """The methods that are compared."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        super().__init__(arguments)
        self.memory = arguments.memory_mb * 2**20

    def ours(self) -> list[list[list[int]]]:
        result = dsteer.sweep(
            self.model, self.tokenizer, self.encoded, self.vector, STRENGTHS,
            max_new_tokens=NEW_TOKENS, memory=self.memory, fast=True,
        )  # fmt: skip
        return [[list(tokens) for tokens in row] for row in result.tokens]

    @torch.inference_mode()
    def usual(self) -> list[list[list[int]]]:
        ids, mask = self.padded()
        vector = self.vector.tensor.to(self.device, self.model.dtype)
        found = []
        for strength in STRENGTHS:

            def hook(_m: Any, _i: Any, output: Tensor, strength: float = strength) -> Tensor:
                return output + strength * vector

            handle = self.model.model.layers[self.block].register_forward_hook(hook)
            made = self.model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False
            )
            handle.remove()
            found.append(made[:, ids.shape[1] :].tolist())
        return found

    def limit(self) -> float:
        """Seconds of the linear layers alone, each at the batch sizes that the sweep has."""
        rows = len(self.encoded) * len(STRENGTHS)
        prompt = sum(len(item.ids) for item in self.encoded)
        total = 0.0
        for number, block in enumerate(self.model.model.layers):
            for module in block.modules():
                if isinstance(module, torch.nn.Linear):
                    shared = 1 if number <= self.block else len(STRENGTHS)
                    total += self._seconds(module, 1024) / 1024 * prompt * shared
                    total += self._seconds(module, rows) * NEW_TOKENS
        return total + self._seconds(self.model.lm_head, rows) * NEW_TOKENS

    @torch.inference_mode()
    def _seconds(self, module: torch.nn.Linear, rows: int) -> float:
        x = torch.randn(rows, module.in_features, device=self.device, dtype=self.model.dtype)
        times = []
        for _ in range(7):
            start = self._now()
            module(x)
            times.append(self._now() - start)
        return statistics.median(times[2:])

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    @torch.inference_mode()
    def ties(self, ours: list[list[list[int]]], usual: list[list[list[int]]]) -> tuple[int, int]:
        """Texts that differ, and how many of them part at a tie."""
        differ = tied = 0
        vector = self.vector.tensor.to(self.device, self.model.dtype)
        for strength, mine, theirs in zip(STRENGTHS, ours, usual, strict=True):
            for item, a, b in zip(self.encoded, mine, theirs, strict=True):
                if a == b:
                    continue
                differ += 1
                same = next(i for i in range(NEW_TOKENS) if a[i] != b[i])
                handle = self.model.model.layers[self.block].register_forward_hook(
                    lambda _m, _i, output, s=strength: output + s * vector
                )
                ids = torch.tensor([[*item.ids, *b[:same]]], device=self.device)
                top = self.model(input_ids=ids).logits[0, -1].float().topk(2).values
                handle.remove()
                tied += bool(top[0] - top[1] <= TIE)
        return differ, tied


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prompts", nargs="?", type=Path, default=PROMPTS, help="hh-rlhf file")
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--n", type=int, default=32, help="prompts")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--memory-mb", type=int, default=1024, help="bound of a batch's cache")
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    bench = Bench(arguments)
    times: dict[str, list[float]] = {"dsteer": [], "usual": []}
    texts: dict[str, list[list[list[int]]]] = {}
    before, peak = psutil.Process().memory_info().rss, 0
    for _ in range(arguments.repeats):
        for name, method in (("dsteer", bench.ours), ("usual", bench.usual)):
            start = bench._now()
            texts[name] = method()
            times[name].append(bench._now() - start)
            if name == "dsteer":
                peak = max(peak, psutil.Process().memory_info().rss - before)
    limit = bench.limit()
    lengths = [len(item.ids) for item in bench.encoded]
    tokens = len(lengths) * len(STRENGTHS) * NEW_TOKENS
    ours = statistics.median(times["dsteer"])
    print(
        f"\n{arguments.shape}, {arguments.dtype}, {bench.device}, "
        f"{torch.get_num_threads()} threads, "
        f"{len(lengths)} prompts of {min(lengths)} to {max(lengths)} tokens (median "
        f"{statistics.median(lengths):g}) × {len(STRENGTHS)} strengths × {NEW_TOKENS} new tokens, "
        f"greedy; medians of {arguments.repeats}\n"
    )
    print("| method | seconds | new tokens/s | dsteer is faster by | of the limit |")
    print("|---|---|---|---|---|")
    for name, values in times.items():
        value = statistics.median(values)
        print(
            f"| {name} | {value:.2f} | {tokens / value:.0f} | {value / ours:.2f} | "
            f"{limit / value:.2f} |"
        )
    print(f"| limit | {limit:.2f} | {tokens / limit:.0f} | {limit / ours:.2f} | 1.00 |")
    differ, tied = bench.ties(texts["dsteer"], texts["usual"])
    print(
        f"\n{differ} of {len(lengths) * len(STRENGTHS)} texts differ, {tied} of them from a tie "
        f"within {TIE:g}. Memory above the model, all methods: {peak / 2**20:.0f} MB; bound of a "
        f"batch's cache: {arguments.memory_mb} MB."
    )


if __name__ == "__main__":
    main()
