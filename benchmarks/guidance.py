"""Guidance against one batch of twice the rows, which no guidance can do without.

Run by hand:  python benchmarks/guidance.py [PROMPTS] [--repeats 5]
On a GPU:     python benchmarks/guidance.py [PROMPTS] --device cuda --shape 1b --dtype bfloat16

The model is a Llama of the named shape with random weights; the prompts are the first of an
hh-rlhf file, tokenised by a byte-level BPE learned from that file's prompts on the spot. A random
vector acts on the middle block; z + 2 (z′ − z), 48 new tokens, greedy.

- *dsteer*: ``dsteer.guided``, both streams rows of one batch;
- *limit, same engine*: ``dsteer.sweep`` of the same prompts at strengths 0 and 1: the same rows,
  each decoded for itself;
- *limit, generate*: ``model.generate`` of every prompt twice, left-padded;
- *processor*: ``dsteer.Guidance`` in ``model.generate`` of every prompt once;
- *two passes*: a hand-written loop, with two caches, a pass of each and a hook.

Methods take turns, so that a change of the machine's pace hits all; medians are printed. dsteer
shall take less than 1.3 times either limit. Texts that differ from those of the two passes are
counted, and a tie is a difference that begins where their two largest guided logits lie within
1e-4 of each other.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sweep import PROMPTS, SHAPES, TIE, Subject
from torch import Tensor
from transformers import DynamicCache

import dsteer

NEW_TOKENS = 48
WEIGHT = 2.0
AIM = 1.3


class Bench(Subject):
    """The methods that are compared."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        super().__init__(arguments)
        self.ids, self.mask = self.padded()

    def guided(self) -> list[list[int]]:
        found = dsteer.guided(
            self.model, self.tokenizer, self.encoded, self.vector, weight=WEIGHT,
            max_new_tokens=NEW_TOKENS, fast=True,
        )  # fmt: skip
        return [list(tokens) for tokens in found.tokens]

    def engine(self) -> None:
        dsteer.sweep(
            self.model, self.tokenizer, self.encoded, self.vector, (0.0, 1.0), NEW_TOKENS, fast=True
        )

    def generate(self) -> None:
        self._generate(self.ids.repeat_interleave(2, 0), self.mask.repeat_interleave(2, 0))

    def processor(self) -> list[list[int]]:
        with dsteer.Guidance(self.model, self.vector, weight=WEIGHT) as guidance:
            made = self._generate(self.ids, self.mask, logits_processor=[guidance])
        return made[:, self.ids.shape[1] :].tolist()

    def _generate(self, ids: Tensor, mask: Tensor, **settings: Any) -> Tensor:
        made: Tensor = self.model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False,
            **settings,
        )  # fmt: skip
        return made

    @torch.inference_mode()
    def two_passes(self) -> list[list[int]]:
        vector = self.vector.tensor.to(self.device, self.model.dtype)
        caches = [DynamicCache(config=self.model.config) for _ in range(2)]
        ids, mask, found = self.ids, self.mask, []
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        for _ in range(NEW_TOKENS):
            logits = []
            for steered, cache in enumerate(caches):
                handle = self.model.model.layers[self.block].register_forward_hook(
                    lambda _m, _i, output, s=steered: output + s * vector
                )
                output = self.model(
                    input_ids=ids, attention_mask=mask, position_ids=positions,
                    past_key_values=cache, use_cache=True, logits_to_keep=1,
                )  # fmt: skip
                handle.remove()
                logits.append(output.logits[:, -1].float())
            z, other = logits
            ids = (z + WEIGHT * (other - z)).argmax(-1, keepdim=True)
            found.append(ids)
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
            positions = positions[:, -1:] + 1
        return torch.cat(found, dim=1).tolist()

    @torch.inference_mode()
    def ties(self, found: list[list[int]], wanted: list[list[int]]) -> tuple[int, int]:
        """Texts that differ, and how many of them part at a tie."""
        differ = tied = 0
        for item, a, b in zip(self.encoded, found, wanted, strict=True):
            if a == b:
                continue
            differ += 1
            same = next(i for i in range(NEW_TOKENS) if a[i] != b[i])
            ids = torch.tensor([[*item.ids, *b[:same]]], device=self.device)
            z = self.model(input_ids=ids).logits[0, -1].float()
            with dsteer.steer(self.model, self.vector):
                other = self.model(input_ids=ids).logits[0, -1].float()
            top = (z + WEIGHT * (other - z)).topk(2).values
            tied += bool(top[0] - top[1] <= TIE)
        return differ, tied

    def seconds(self, method: Callable[[], Any]) -> tuple[float, Any]:
        start = self._now()
        made = method()
        return self._now() - start, made

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prompts", nargs="?", type=Path, default=PROMPTS, help="hh-rlhf file")
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--n", type=int, default=32, help="prompts")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None)
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    bench = Bench(arguments)
    methods: dict[str, Callable[[], Any]] = {
        "dsteer": bench.guided,
        "limit, same engine": bench.engine,
        "limit, generate": bench.generate,
        "processor": bench.processor,
        "two passes": bench.two_passes,
    }
    times: dict[str, list[float]] = {name: [] for name in methods}
    texts: dict[str, Any] = {}
    for repeat in range(arguments.repeats + 1):
        for name, method in methods.items():
            seconds, texts[name] = bench.seconds(method)
            if repeat:  # the first round warms up
                times[name].append(seconds)
    lengths = [len(item.ids) for item in bench.encoded]
    ours = statistics.median(times["dsteer"])
    print(
        f"\n{arguments.shape}, {arguments.dtype}, {bench.device}, {torch.get_num_threads()} "
        f"threads, {len(lengths)} prompts of {min(lengths)} to {max(lengths)} tokens (median "
        f"{statistics.median(lengths):g}) × {NEW_TOKENS} new tokens, greedy; medians of "
        f"{arguments.repeats}\n"
    )
    print("| method | seconds | guided tokens/s | dsteer takes, of it |")
    print("|---|---|---|---|")
    for name, values in times.items():
        value = statistics.median(values)
        print(
            f"| {name} | {value:.2f} | {len(lengths) * NEW_TOKENS / value:.0f} | "
            f"{ours / value:.2f} |"
        )
    worst = max(ours / statistics.median(times[name]) for name in times if "limit" in name)
    verdict = "met" if worst < AIM else "missed"
    print(f"\nAt most {worst:.2f} times one batch of twice the rows; aim: below {AIM}, {verdict}.")
    for name in ("dsteer", "processor"):
        differ, tied = bench.ties(texts[name], texts["two passes"])
        print(
            f"{name}: {differ} of {len(lengths)} texts differ from the two passes', {tied} of them "
            f"from a tie within {TIE:g}."
        )


if __name__ == "__main__":
    main()
