"""The benchmarks run and print what the style of a row promises; their numbers are for a quiet machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.slow
def test_the_lift_benchmark_names_its_baselines_its_spread_and_its_machine():
    command = [sys.executable, str(BENCHMARKS / "lift.py"), "--quick", "--dtypes", "fp32"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *rows, machine = done.stdout.splitlines()
    assert [row.split(",")[0] for row in rows] == ["lift fwd+bwd", "lift 50% predicted", "hidden to lift"] * 2
    for baseline in ("x bare products (", "x softmax(logits) @ E (", "% of logits"):
        assert baseline in rows[0]
    assert all("3 runs" in row for row in rows)
    assert "torch" in machine


@pytest.mark.slow
def test_the_field_benchmark_names_its_baseline_its_spread_and_its_machine():
    command = [sys.executable, str(BENCHMARKS / "field.py"), "--quick", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *rows, machine = (line for line in done.stdout.splitlines() if "resident" not in line)
    assert [row.split(",")[0] for row in rows] == [
        "field gaussian joint",
        "field gaussian separate",
        "field gaussian two_sided",
        "field laplace joint",
    ]
    for what in ("x cdist and softmax (", "3 runs", " ms ", "workspace", "MiB (dense"):
        assert all(what in row for row in rows)
    assert "torch" in machine


@pytest.mark.slow
def test_the_objectives_benchmark_names_its_baseline_its_spread_and_its_machine():
    command = [sys.executable, str(BENCHMARKS / "objectives.py"), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *rows, machine = done.stdout.splitlines()
    assert [row.split()[0] for row in rows] == ["MaskedDiffusion", "UniformDiffusion"] * 2
    assert all("x published form (" in row and "3 runs" in row and "workspace" in row for row in rows)
    assert "torch" in machine


@pytest.mark.slow
def test_the_pairs_benchmark_names_its_baseline_its_spread_and_its_machine():
    command = [sys.executable, str(BENCHMARKS / "pairs.py"), "--quick", "--forms", "pairs, 4096 buckets", "triples"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *rows, machine = done.stdout.splitlines()
    assert [row.split(" fwd+bwd")[0] for row in rows] == ["pairs, 4096 buckets", "triples"]
    assert all("x drift of features (" in row and "3 runs" in row and "x logits" in row for row in rows)
    assert "torch" in machine


@pytest.mark.slow
def test_the_sampling_benchmark_names_its_baseline_its_spread_and_its_machine():
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "sampling.py"), "--quick"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    *rows, machine = done.stdout.splitlines()
    assert [row.split()[:2] for row in rows] == [
        ["ancestral", "masked"],
        ["head", "masked"],
        ["ReMDM", "masked"],
        ["ancestral", "uniform"],
    ]
    assert all("overhead" in row and "dense   whole run" in row and "2 runs" in row for row in rows)
    assert "x logits (dense" in rows[0]
    assert "torch" in machine


@pytest.mark.slow
def test_the_gen_ppl_benchmark_names_its_baselines_its_spread_and_its_machine():
    command = [sys.executable, str(BENCHMARKS / "generative_perplexity.py"), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *rows, machine = done.stdout.splitlines()
    assert [row.split(",")[2].split()[0] for row in rows] == ["equal", "uniform", "long"]
    for what in ("x evaluate style, batch 16 (", "x one by one (", "by bfloat16 (", "3 runs", "deviation"):
        assert all(what in row for row in rows)
    assert "torch" in machine


@pytest.mark.slow
def test_the_step_benchmark_names_its_baselines_its_spread_and_its_machine():
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "step.py"), "--quick"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    *rows, machine = done.stdout.splitlines()
    forms = ("drift step", "drift step from hidden states")
    assert [row.split(",")[:2] for row in rows] == [
        [form, f" {kind}"] for kind in ("masked", "uniform") for form in forms
    ] * 2
    for what in ("x continuation (", "x plain port (", "3 runs", " ms ", "peak ", "MiB"):
        assert all(what in row for row in rows)
    assert "torch" in machine


@pytest.mark.slow
def test_the_gpu_benchmark_runs_without_a_gpu_on_tiny_sizes(tmp_path):
    parts = ("losses", "step", "sampling", "equality", "refine")
    texts = map(str, sorted((BENCHMARKS.parent / "docs").glob("*.md")))
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--dry", "--output", str(tmp_path), "--text", *texts]
    done = subprocess.run([*command, "--parts", *parts], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert {name: part["state"] for name, part in found.items()} == dict.fromkeys(parts, "complete")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu.json", "gpu.md", "samples.zip"]
