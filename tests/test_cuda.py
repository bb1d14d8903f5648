"""On a GPU: every public entry point runs there, gives what a CPU gives, and does not wait without need.

All tests are marked ``cuda`` and skipped without a GPU. ``--cuda-device=cpu`` runs them on a CPU, to check the tests
themselves: what only a GPU has (its streams, graphs, and the mode in which waiting is an error) is left out then.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import refine_worker as worker
import torch
from equality import LENGTH, VOCAB, LookUp, cases, compare, differing_ids, field_under_tf32, make_batch, make_network
from test_waits import WAITS

from tokendrift import DriftField, FeatureQueue, PairDriftLoss, PooledFeatures, TokenDriftLoss, soft_token_lift
from tokendrift.demo.shipped import pretrained_path
from tokendrift.diffusion import GaussianUniformDiffusion, MaskedDiffusion, UniformDiffusion
from tokendrift.evaluation import generative_perplexity, validation_nelbo
from tokendrift.evaluation.report import EvaluateConfig, evaluate_files
from tokendrift.sampling import named_sampler, sample
from tokendrift.sampling.to_file import SampleConfig, sample_to_file
from tokendrift.training import LoopConfig, Optimization, OwnTrajectories, read_log, refine
from tokendrift.variants import ImageDriftField, build_field

pytestmark = pytest.mark.cuda

CASES = cases()
DTYPES = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (2e-2, 2e-2), torch.float16: (1e-2, 1e-2)}
MASKED, UNIFORM = MaskedDiffusion(VOCAB), UniformDiffusion(VOCAB)
PROCESSES = [MASKED, UNIFORM, GaussianUniformDiffusion(VOCAB, 0.1), GaussianUniformDiffusion(VOCAB, 0.1, top_k=4)]
SAMPLER_NAMES = ("ancestral", "analytic", "remdm-cap", "remdm-conf", "remdm-loop", "first-hitting")


@pytest.fixture(autouse=True)
def device(request):
    """The device of the tests: the GPU, or what the option names."""
    found = torch.device(request.config.getoption("--cuda-device"))
    if found.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU; --cuda-device=cpu checks the tests themselves")
    return found


@contextlib.contextmanager
def waiting_is_an_error(device):
    """Let a GPU raise where the host would wait for it."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(function, device):
    """Return what runs a function again as a CUDA graph."""
    if device.type != "cuda":
        return function
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def compiled(function, device):
    return torch.compile(function, backend="inductor" if device.type == "cuda" else "aot_eager")


# ------------------------------------------------------------------------------------------------------ losses


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_losses_and_their_gradients_are_those_of_the_cpu(name, dtype, device):
    value, gradient = DTYPES[dtype]
    off = compare(CASES[name], device, dtype)
    assert off.value < value and off.gradient < gradient, off


@pytest.mark.parametrize("name", [name for name in CASES if not WAITS.get(name)])
def test_a_loss_and_its_gradient_do_not_wait_for_the_device(name, device):
    run = CASES[name](device, torch.float32)
    run()  # the first call may look at its arguments
    with waiting_is_an_error(device):
        run()


def test_the_loss_of_pairs_takes_its_laws_in_without_waiting(device):
    loss, batch = PairDriftLoss(VOCAB, mask_id=MASKED.mask_id).to(device), make_batch(MASKED, device, torch.float32)
    with waiting_is_an_error(device):
        for _ in range(2):
            loss(batch.logits[0], batch.x0, noisy_ids=batch.x_t)
    assert loss.total_variation().isfinite().all()


def make_drift(process, device, **options):
    features = PooledFeatures(make_network(process, torch.device("cpu")))
    options = {"queue_size": 16, "mask_id": process.mask_id} | options
    return TokenDriftLoss(features.embedding, features, **options).to(device)


def test_queues_are_filled_and_read_without_waiting(device):
    loss, batch = make_drift(UNIFORM, device), make_batch(UNIFORM, device, torch.float32)
    with waiting_is_an_error(device):
        for _ in range(5):
            output = loss(batch.logits[0], batch.x0, return_diagnostics=True)
    assert len(loss.queue_real) == 16
    assert torch.stack([output.loss, output.diagnostics.token_entropy, *output.diagnostics.field.rms]).isfinite().all()


def test_rows_that_are_not_finite_do_not_enter_a_queue(device):
    queue = FeatureQueue(8).to(device)
    rows = torch.arange(12.0, device=device).view(4, 3)
    rows[1, 0] = torch.nan
    queue.push(rows)
    assert len(queue) == (3 if device.type == "cpu" else 4)  # a GPU would have to be waited for to count them
    assert queue.features().isfinite().all()
    assert torch.equal(queue.features()[:3], rows[[0, 2, 3]])


def test_diverged_logits_give_nan_and_change_no_queue(device):
    loss, batch = make_drift(UNIFORM, device), make_batch(UNIFORM, device, torch.float32)
    loss(batch.logits[1], batch.x0)
    before = loss.queue_generated.features().clone()
    batch.logits[0][0, 0, 0] = torch.nan
    if device.type == "cpu":
        pytest.skip("on a CPU they are an error")
    assert loss(batch.logits[0], batch.x0).isnan()
    assert torch.equal(loss.queue_generated.features()[: len(before)], before)


@pytest.mark.parametrize("process", [MASKED, UNIFORM], ids=["masked", "uniform"])
def test_a_compiled_loss_is_the_loss(process, device):
    eager, other = (make_drift(process, device, queue_size=0) for _ in range(2))
    batch = make_batch(process, device, torch.float32)
    options = {} if process.mask_id is None else {"noisy_ids": batch.x_t}
    found = []
    for loss in (eager, compiled(other, device)):
        leaf = batch.logits[0].detach().requires_grad_()
        value = loss(leaf, batch.x0, **options)
        value.backward()
        found.append((value.detach(), leaf.grad))
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["drift", "pairs"])
def test_a_loss_step_can_be_captured_in_a_graph(name, device):
    """Of a uniform-state model. That of a masked model reads how many positions are predicted, which no graph can."""
    batch = make_batch(UNIFORM, device, torch.float32)
    loss = make_drift(UNIFORM, device) if name == "drift" else PairDriftLoss(VOCAB).to(device)
    loss(batch.logits[1], batch.x0)
    loss.eval()
    leaf, value = batch.logits[0].clone().requires_grad_(), torch.zeros((), device=device)
    leaf.grad = torch.zeros_like(leaf)

    def step():
        leaf.grad.zero_()
        found = loss(leaf, batch.x0)
        found.backward()
        value.copy_(found.detach())

    step()
    replay = captured(step, device)
    with torch.no_grad():
        leaf.copy_(batch.logits[2])
    replay()
    found = value.clone(), leaf.grad.clone()
    step()
    torch.testing.assert_close(found, (value, leaf.grad), rtol=1e-4, atol=1e-7)


def test_the_lift_holds_little_beside_the_gradient_of_the_logits(device):
    if device.type != "cuda":
        pytest.skip("the memory of a CPU is counted in tests/test_lift.py")
    logits = torch.randn(1, 4096, 8192, device=device, requires_grad=True)
    table = torch.randn(8192, 256, device=device)
    soft_token_lift(logits, table).sum().backward()
    logits.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    soft_token_lift(logits, table).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 1.25 * logits.nbytes


# ------------------------------------------------------------------------------------------------------ fields


def test_tf32_changes_nothing_in_a_field(device):
    assert field_under_tf32(device) == 0


@pytest.mark.parametrize("normalization", ["joint", "separate", "two_sided", "sinkhorn"])
@pytest.mark.parametrize("kernel", ["gaussian", "laplace", "sharp_laplace"])
def test_fields_are_those_of_the_cpu(kernel, normalization, device):
    generator = torch.Generator().manual_seed(0)
    clouds = [torch.randn(count, 12, generator=generator) for count in (5, 40, 30)]
    field = build_field((2.0, 10.0), kernel=kernel, normalization=normalization)
    own = torch.arange(5)
    expected = field(*clouds, exclude_negative=own)
    found = field(*(cloud.to(device) for cloud in clouds), exclude_negative=own.to(device))
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-5)


def test_further_fields_run(device):
    clouds = [torch.randn(count, 12, device=device) for count in (5, 40, 30)]
    weights = torch.rand(40, device=device)
    drift, diagnostics = DriftField(temperatures=(5.0,)).diagnose(*clouds, positive_weights=weights)
    assert ImageDriftField()(*clouds).isfinite().all() and drift.isfinite().all()
    assert all(each.device.type == device.type for each in diagnostics)


# ------------------------------------------------------------------------------------------------------ processes


@pytest.mark.parametrize("process", PROCESSES, ids=["masked", "uniform", "Gaussian", "Gaussian top-k"])
def test_a_generator_of_the_device_fixes_the_corruption(process, device):
    x0 = torch.randint(VOCAB - 1, (8, LENGTH), device=device)
    one, other = (process.corrupt(x0, generator=torch.Generator(device).manual_seed(3)) for _ in range(2))
    assert torch.equal(one.x_t, other.x_t) and torch.equal(one.t, other.t)
    assert {each.device.type for each in one} == {device.type}
    model = make_network(process, device)
    assert one.denoise(model).shape == (8, LENGTH, VOCAB)


# ------------------------------------------------------------------------------------------------------ samplers


def test_the_same_seed_gives_the_same_ids_in_any_split_into_batches(device):
    """A denoiser without products: those of a network may be rounded in another way in batches of another size."""
    shares = differing_ids(device)
    assert {name: share for name, share in shares.items() if "look-up, batches" in name and share} == {}
    assert all(share < 0.01 for name, share in shares.items() if "look-up, on the CPU" in name), shares


@pytest.mark.parametrize("name", SAMPLER_NAMES)
def test_every_sampler_fills_every_mask(name, device):
    steps = None if name == "first-hitting" else 8
    found = sample(make_network(MASKED, device), MASKED, (3, LENGTH), steps=steps, sampler=named_sampler(name), seed=0)
    assert found.ids.device.type == device.type and (found.ids != MASKED.mask_id).all()


def test_samples_of_a_uniform_model_follow_a_prefix_and_windows(device):
    given, fixed = torch.full((2, 40), 7), torch.zeros(2, 40, dtype=torch.bool)
    fixed[:, :5] = True
    options = {"steps": 4, "window": LENGTH, "top_p": 0.9, "noise_removal": "greedy", "seed": 0}
    for process in (UNIFORM, MASKED):
        model = make_network(process, device)
        found = sample(model, process, (2, 40), given=given, given_mask=fixed, **options).ids
        assert (found[:, :5] == 7).all() and found.shape == (2, 40)


# ------------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("process", [MASKED, UNIFORM], ids=["masked", "uniform"])
def test_losses_train_under_autocast_with_scaled_gradients(process, dtype, device):
    model, loss = make_network(process, device).train(), make_drift(process, device)
    pairs = PairDriftLoss(VOCAB, mask_id=process.mask_id).to(device)
    optimizer, scaler = (
        torch.optim.AdamW(model.parameters(), lr=1e-4),
        torch.amp.GradScaler(device.type, init_scale=8.0),
    )
    x0 = make_batch(process, device, torch.float32).x0
    generator = torch.Generator(device).manual_seed(0)
    before = model.output_layer.linear.weight.detach().clone()
    for _ in range(2):
        corrupted = process.corrupt(x0, generator=generator)
        where = {"noisy_ids": corrupted.x_t, "predicted": corrupted.predicted}
        with torch.autocast(device.type, dtype):
            logits = corrupted.denoise(model)
            total = loss(logits, x0, **where) + pairs(logits, x0, **where)
            total = total + process.nelbo(logits, x0, corrupted.x_t, corrupted.t).mean()
        assert logits.dtype == dtype and total.dtype == torch.float32
        scaler.scale(total).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    after = model.output_layer.linear.weight
    assert after.isfinite().all() and not torch.equal(before, after)


def test_own_chains_train_with_compiled_blocks(device):
    model = make_network(MASKED, device)
    for block in model.blocks:
        block.compile(backend="inductor" if device.type == "cuda" else "aot_eager")
    generator = torch.Generator(device).manual_seed(0)
    pairs = PairDriftLoss(VOCAB, strata=4, mask_id=MASKED.mask_id).to(device)
    objective = OwnTrajectories(MASKED, pairs, base_weight=0.1, generator=generator)
    optimization = Optimization(model, LoopConfig(3, warmup=0), autocast=torch.bfloat16)
    x0 = make_batch(MASKED, device, torch.float32).x0
    records = [optimization.step(step, objective, [x0], log=True) for step in range(3)]
    assert all(record["grad_norm"] > 0 for record in records)


@pytest.mark.parametrize("objective", ["drift", "continuation", "pairs", "matching"])
def test_a_refinement_resumes_where_it_was_interrupted(objective, tmp_path, device):
    worker.make_inputs(tmp_path)
    settings = {"objective": objective, "steps": 4, "precision": "bf16", "pair_sequences": 16, "log_every": 1}
    config = worker.config(tmp_path, **settings)

    def interrupt(step):
        if step == 2:
            raise KeyboardInterrupt

    whole = refine(config.replace(output=str(tmp_path / "whole")), progress=False).folder
    with pytest.raises(KeyboardInterrupt):
        refine(config, progress=False, on_step=interrupt)
    resumed = refine(config, progress=False).folder
    for one, other in zip(read_log(whole, "train"), read_log(resumed, "train"), strict=True):
        assert one.keys() == other.keys()
        # Sums of a GPU may be taken in another order in another run.
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-2)


# ------------------------------------------------------------------------------------------------------ evaluation


def test_samples_of_a_checkpoint_are_written_and_judged(tmp_path, device):
    config = SampleConfig(str(pretrained_path("masked")), n=6, steps=4, batch_size=4, device=str(device))
    sample_to_file(config, tmp_path / "samples.jsonl")
    real = str(Path(__file__).parents[1] / "docs" / "method.md")
    options = {"judge": (str(pretrained_path("judge")),), "resamples": 10, "device": str(device)}
    found = evaluate_files(EvaluateConfig((str(tmp_path / "samples.jsonl"),), real=real, **options))
    assert found.texts.keys() > {"real text"} and found.table().row_count


def test_perplexities_and_likelihoods_are_those_of_the_cpu(device):
    ids = torch.randint(1, 1024, (5, 30), generator=torch.Generator().manual_seed(0))
    judge = str(pretrained_path("judge"))
    one, other = (generative_perplexity(ids, judge, device=place).perplexity for place in (device, "cpu"))
    assert one == pytest.approx(other, rel=1e-4)
    x0 = make_batch(MASKED, torch.device("cpu"), torch.float32).x0
    one, other = (
        validation_nelbo(make_network(MASKED, place), MASKED, x0.to(place)) for place in (device, torch.device("cpu"))
    )
    assert one == pytest.approx(other, rel=1e-3)


def test_a_denoiser_is_called_on_the_device_of_its_parameters(device):
    found = sample(LookUp(UNIFORM).to(device), UNIFORM, (2, 8), steps=2, seed=0)
    assert found.ids.device.type == device.type
