"""Peak memory: states in memory, states on disk, and moments, at 1,000 and 10,000 prompts.

Run by hand; each row of the table is a process of its own:

    OMP_NUM_THREADS=2 python benchmarks/moments.py [--prompts 1000 10000] [--width 256] [--blocks 4]

A random pair of models of the given width reads random ids at every site; then v* and both spectra
of H_base, H_tuned and ΔH are measured at each. *Peak* is the process's largest resident memory (of
files that are mapped, the pages that were read count), *above models* what is left of it without
what the process held before it read anything. *Stored* is what lies on disk at the end. The peer
is keeping the states, in memory or on disk; the limit is one part's states and the moments, which
do not depend on how many prompts there are.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dsteer.activations.accumulate import accumulate, part_rows
from dsteer.activations.extract import extract
from dsteer.data.tokens import Encoded
from dsteer.geometry.spectrum import spectra, spectra_from_moments
from dsteer.geometry.sums import BUCKETS, NULL_DRAWS
from dsteer.models.pair import ModelPair
from dsteer.steering.build import mean_difference

MODES = ("in memory", "on disk", "moments")
VOCABULARY = 512


def peak() -> float:
    """Largest resident memory of this process so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def make_pair(width: int, blocks: int) -> ModelPair:
    """A random Llama, and the same with every weight a little moved."""
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    base = LlamaForCausalLM(shape).eval()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for weight in tuned.parameters():
            weight += 0.005 * torch.randn(weight.shape)
    return ModelPair.load(base, tuned)


def prompts(count: int) -> Iterator[Encoded]:
    """Random ids, 4 to 15 a prompt."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        length = int(rng.integers(4, 16))
        yield Encoded(tuple(rng.integers(0, VOCABULARY, length).tolist()), length)


def measure(mode: str, count: int, width: int, blocks: int) -> dict[str, float]:
    """Read and measure in one mode; this process's peak, and what it keeps on disk."""
    pair = make_pair(width, blocks)
    extract(pair, list(prompts(64)))  # what the first pass loads
    before, start = peak(), time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if mode == "moments":
            moments = accumulate(pair, prompts(count), folder=folder)
            mean_difference(moments)
            for site in moments.sites:
                for matrix in moments[site].matrices.values():
                    spectra_from_moments(matrix)
        else:
            acts = extract(pair, list(prompts(count)), folder=folder if mode == "on disk" else None)
            mean_difference(acts)
            for site in acts.sites:
                spectra(acts.base[site])
                spectra(acts.tuned[site])
                spectra(acts.displacement(site))
        stored = sum(path.stat().st_size for path in folder.iterdir()) / 2**20
    return {
        "peak": peak(),
        "above": peak() - before,
        "stored": stored,
        "seconds": time.perf_counter() - start,
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--only", choices=MODES, help=argparse.SUPPRESS)  # in a process of its own
    arguments = parser.parse_args()
    width, blocks = arguments.width, arguments.blocks
    if arguments.only is not None:
        print(json.dumps(measure(arguments.only, arguments.prompts[0], width, blocks)))
        return
    sites = blocks + 1
    kept = 3 * (width + 1) ** 2 + 2 * (BUCKETS + NULL_DRAWS) * width
    limit = sites * (part_rows(width) * width + kept) * 8 / 2**20
    print(
        f"{sites} sites, d = {width}, {torch.get_num_threads()} threads; one part of "
        f"{part_rows(width)} rows and the moments take {limit:.0f} MB\n"
    )
    print("| states | prompts | peak, MB | above models, MB | stored, MB | seconds |")
    print("|---|---|---|---|---|---|")
    for mode in MODES:
        for count in arguments.prompts:
            done = subprocess.run(
                [
                    sys.executable, __file__, "--only", mode, "--prompts", str(count),
                    "--width", str(width), "--blocks", str(blocks),
                ],
                check=True,
                capture_output=True,
                text=True,
            )  # fmt: skip
            found = json.loads(done.stdout.splitlines()[-1])
            print(
                f"| {mode} | {count:,} | {found['peak']:.0f} | {found['above']:.0f} | "
                f"{found['stored']:.1f} | {found['seconds']:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
