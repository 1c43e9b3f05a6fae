"""Hidden states of real prompts at every site: dsteer, the usual ways, and the limit.

Run by hand:  python benchmarks/extraction.py [PROMPTS] [--dtype float32 bfloat16] [--repeats 5]
On a GPU:     python benchmarks/extraction.py [PROMPTS] --device cuda --shape 7b --dtype bfloat16

The model is a Llama of the named shape with random weights; the prompts are the first 96 of an
hh-rlhf file, tokenised by a byte-level BPE learned from that file's prompts on the spot. All
methods read the last prompt token at every block and at the final norm, of the same ids:

- *dsteer*: one pass for all sites, sorted batches of a token budget, right padding without a mask,
  no head, no cache, on a CPU one batch a core; *to disk*: the same, streamed into a file;
- *(a) one at a time*: a hook on each block and on the final norm, one call of the model a prompt;
- *(b) hidden_states*: ``output_hidden_states=True``, 16 prompts padded together, with a mask;
- *(c) steering-vectors*: ``extract_activations`` of that package, 1 and 16 pairs a batch, if it is
  installed (``peers.txt``); it reads no final norm;
- *(d) limit*: the linear layers of the blocks alone, at their fastest batch shape, without padding.

Methods take turns, so that a change of the machine's pace hits all; medians are printed. Memory is
the peak above the loaded model, each method in a process of its own. *Error* is the largest
‖h − h_a‖ / ‖h_a‖ over prompts and sites.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from dsteer.activations.reading import Reading
from dsteer.data import load_preferences
from dsteer.data.tokens import Encoded, encode
from dsteer.models.pair import ModelPair
from dsteer.models.tiny import build_tokenizer

SHAPES = {
    "tiny": {  # only to see that the script runs
        "vocab_size": 2048, "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 2048, "tie_word_embeddings": True,
    },
    "smollm2-135m": {
        "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "max_position_embeddings": 2048, "tie_word_embeddings": True,
    },
    "7b": {
        "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 11_008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
        "max_position_embeddings": 4096, "tie_word_embeddings": False,
    },
}  # fmt: skip

PROMPTS = Path(__file__).parents[2] / "shared" / "data" / "hh-rlhf-harmless-base-test.jsonl.gz"

Method = Callable[[], Tensor]
"""Reads every prompt; gives states (sites, prompts, d) in float32 on the CPU."""


class Bench:
    """One model, the prompts, and the ways to read it."""

    def __init__(self, arguments: argparse.Namespace, dtype: str) -> None:
        self.device = torch.device(arguments.device)
        self.dtype = getattr(torch, dtype)
        shape = SHAPES[arguments.shape]
        pairs = load_preferences(str(arguments.prompts))
        self.tokenizer = build_tokenizer(
            (str(pair.prompt) for pair in pairs), int(shape["vocab_size"])
        )
        self.texts = [str(pair.prompt) for pair in pairs[: arguments.n]] * arguments.copies
        self.encoded: list[Encoded] = encode(self.tokenizer, self.texts)
        torch.manual_seed(0)
        with torch.device(self.device):
            previous = torch.get_default_dtype()
            torch.set_default_dtype(self.dtype)
            self.model = LlamaForCausalLM(LlamaConfig(**shape)).eval()
            torch.set_default_dtype(previous)
        self.pair = ModelPair.load(self.model, self.model, tokenizer=self.tokenizer)
        self.budget = arguments.batch_tokens

    @property
    def tokens(self) -> int:
        return sum(len(item.ids) for item in self.encoded)

    def methods(self) -> dict[str, Method]:
        found: dict[str, Method] = {
            "dsteer": self.ours,
            "dsteer, to disk": self.ours_to_disk,
            "(a) one at a time": self.one_at_a_time,
            "(b) hidden_states": self.hidden_states,
        }
        if importlib.util.find_spec("steering_vectors") is not None:
            found["(c) steering-vectors, 1"] = lambda: self.steering_vectors(1)
            found["(c) steering-vectors, 16"] = lambda: self.steering_vectors(16)
        return found

    def ours(self) -> Tensor:
        states = Reading.of(self.pair, self.encoded, batch_tokens=self.budget).run(
            self.model, "base"
        )
        return torch.stack(list(states.values()))

    def ours_to_disk(self) -> Tensor:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "base.safetensors"
            reading = Reading.of(self.pair, self.encoded, batch_tokens=self.budget)
            reading.run(self.model, "base", path)
        return torch.empty(0)

    @torch.inference_mode()
    def one_at_a_time(self) -> Tensor:
        caught: list[Tensor] = []

        def hook(_module: object, _inputs: object, output: Any) -> None:
            state = output[0] if isinstance(output, tuple) else output
            caught.append(state[0, -1].float().cpu().clone())

        modules = [*self.model.model.layers, self.model.model.norm]
        handles = [module.register_forward_hook(hook) for module in modules]
        for item in self.encoded:
            self.model(input_ids=torch.tensor([item.ids], device=self.device))
        for handle in handles:
            handle.remove()
        return torch.stack(caught).view(len(self.encoded), len(modules), -1).transpose(0, 1)

    @torch.inference_mode()
    def hidden_states(self, size: int = 16) -> Tensor:
        found = []
        for start in range(0, len(self.texts), size):
            batch = self.tokenizer(
                self.texts[start : start + size], return_tensors="pt", padding=True
            ).to(self.device)
            states = self.model(**batch, output_hidden_states=True).hidden_states
            last = batch["attention_mask"].sum(1) - 1
            rows = torch.arange(len(last), device=self.device)
            found.append(torch.stack([state[rows, last].float().cpu() for state in states[1:]]))
        return torch.cat(found, 1)

    def steering_vectors(self, size: int) -> Tensor:
        from steering_vectors.train_steering_vector import extract_activations

        half = len(self.texts) // 2
        pairs = list(zip(self.texts[:half], self.texts[half:], strict=True))
        first, second = extract_activations(
            self.model, self.tokenizer, pairs, move_to_cpu=True, batch_size=size
        )
        return torch.stack(
            [torch.cat([*first[layer], *second[layer]]).float() for layer in sorted(first)]
        )

    @torch.inference_mode()
    def limit(self, rows: Sequence[int] = (512, 1024, 2048, 4096)) -> tuple[float, int]:
        """Seconds a token in the blocks' linear layers, and the rows at which they are fastest."""
        weights = [
            module.weight
            for module in self.model.model.layers.modules()
            if isinstance(module, torch.nn.Linear)
        ]
        best = (float("inf"), 0)
        for count in rows:
            inputs = {
                width: torch.randn(count, width, device=self.device, dtype=self.dtype)
                for width in {weight.shape[1] for weight in weights}
            }
            start = self.now()
            for weight in weights:
                torch.nn.functional.linear(inputs[weight.shape[1]], weight)
            best = min(best, ((self.now() - start) / count, count))
        return best

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def seconds(bench: Bench, repeats: int) -> tuple[dict[str, list[float]], list[tuple[float, int]]]:
    """Times of each method and of the limit, taking turns."""
    methods = bench.methods()
    times: dict[str, list[float]] = {name: [] for name in methods}
    limits = []
    for turn in range(repeats + 1):  # the first turn warms up
        limit = bench.limit()
        for name, method in methods.items():
            start = bench.now()
            method()
            if turn:
                times[name].append(bench.now() - start)
        if turn:
            limits.append(limit)
    return times, limits


def errors(bench: Bench) -> dict[str, float]:
    """Largest relative distance of each method's states from those read one at a time."""
    methods = bench.methods()
    expected = methods["(a) one at a time"]()
    found = {}
    for name, method in methods.items():
        states = method()
        if states.numel():
            wanted = expected[: len(states)]
            if name.startswith("(b)"):  # it lacks the raw output of the last block
                wanted = expected[[*range(len(states) - 1), -1]]
            found[name] = float(((states - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max())
    return found


def peak_memory(bench: Bench, name: str) -> int:
    """Bytes above the loaded model that a method took at most (Linux, or a GPU)."""
    method = bench.methods()[name]
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        method()
        return torch.cuda.max_memory_allocated() - before
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    method()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024


def memory_in_own_process(arguments: list[str], name: str, dtype: str, copies: int) -> int | None:
    command = [sys.executable, __file__, *arguments, "--memory-of", name,
               "--dtype", dtype, "--copies", str(copies)]  # fmt: skip
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return int(json.loads(answer.stdout)) if answer.returncode == 0 else None


def report(bench: Bench, arguments: argparse.Namespace, dtype: str, own: list[str]) -> None:
    times, limits = seconds(bench, arguments.repeats)
    wrong = errors(bench)
    medians = {name: statistics.median(values) for name, values in times.items()}
    ours = medians["dsteer"]
    per_token = statistics.median(value for value, _ in limits)
    floor = per_token * bench.tokens
    lengths = [len(item.ids) for item in bench.encoded]
    print(
        f"\n{arguments.shape}, {dtype}, {bench.device}"
        f"{f' {torch.cuda.get_device_name()}' if bench.device.type == 'cuda' else ''}, "
        f"{torch.get_num_threads()} threads, {len(lengths)} prompts of {min(lengths)} to "
        f"{max(lengths)} tokens, median {statistics.median(lengths):g}, {bench.tokens} in all; "
        f"medians of {arguments.repeats}\n"
    )
    print("| method | seconds | tokens/s | dsteer is faster by | of the limit | peak MB | error |")
    print("|---|---|---|---|---|---|---|")
    for name, value in medians.items():
        memory = None if arguments.no_memory else memory_in_own_process(own, name, dtype, 1)
        print(
            f"| {name} | {value:.2f} | {bench.tokens / value:.0f} | {value / ours:.2f} | "
            f"{floor / value:.2f} | {'–' if memory is None else f'{memory / 1e6:.0f}'} | "
            f"{f'{wrong[name]:.0e}' if name in wrong else '–'} |"
        )
    print(
        f"| (d) limit, {statistics.median(rows for _, rows in limits):g} rows | {floor:.2f} | "
        f"{1 / per_token:.0f} | {floor / ours:.2f} | 1.00 | – | – |"
    )
    if not arguments.no_memory:
        sizes = [memory_in_own_process(own, "dsteer, to disk", dtype, copies) for copies in (1, 8)]
        if None not in sizes:
            print(
                f"\nPeak memory to disk: {sizes[0] / 1e6:.0f} MB for {len(lengths)} prompts, "  # type: ignore[operator]
                f"{sizes[1] / 1e6:.0f} MB for {8 * len(lengths)}."  # type: ignore[operator]
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prompts", nargs="?", type=Path, default=PROMPTS, help="hh-rlhf file")
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--n", type=int, default=96, help="prompts")
    parser.add_argument("--copies", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--batch-tokens", type=int, default=None)
    parser.add_argument("--no-memory", action="store_true", help="skip the memory measurements")
    parser.add_argument("--memory-of", default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    if arguments.memory_of is not None:
        print(json.dumps(peak_memory(Bench(arguments, arguments.dtype[0]), arguments.memory_of)))
        return
    own = [str(arguments.prompts), "--shape", arguments.shape, "--device", arguments.device,
           "--n", str(arguments.n)]  # fmt: skip
    if arguments.threads is not None:
        own += ["--threads", str(arguments.threads)]
    if arguments.batch_tokens is not None:
        own += ["--batch-tokens", str(arguments.batch_tokens)]
    for dtype in arguments.dtype:
        report(Bench(arguments, dtype), arguments, dtype, own)


if __name__ == "__main__":
    main()
