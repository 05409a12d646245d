"""psvae.flow: schedules, noise, loss, guidance, samplers, and models of other conventions."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from psvae import PrefixCache
from psvae.errors import ConfigError, DtypeError, ShapeError
from psvae.flow import (
    Guidance,
    add_noise,
    classifier_free,
    clean_latents,
    dimension_shift,
    dual_guidance,
    flow_loss,
    from_jit,
    from_sit,
    guided,
    renormalise,
    sample,
    sample_sigmas,
    shift_sigmas,
    sigma_schedule,
    to_sit,
    velocity_from_clean,
    velocity_target,
)
from tests.generators.test_deep_fusion import tiny_model, words
from tests.tiny import latents


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Counted:
    """A velocity that remembers each σ and dtype it was asked at."""

    def __init__(self, velocity):
        self.velocity, self.sigmas, self.dtypes = velocity, [], []

    def __call__(self, x, sigmas):
        self.sigmas.append(sigmas.tolist())
        self.dtypes.append((x.dtype, sigmas.dtype))
        return self.velocity(x, sigmas)


# σ: which ones


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
@pytest.mark.parametrize("num_steps", [1, 2, 50])
def test_n_updates_are_n_plus_one_sigmas(num_steps, shift):
    sigmas = sigma_schedule(num_steps, shift)
    assert sigmas.shape == (num_steps + 1,)
    assert sigmas.dtype == torch.float32
    assert (sigmas[0], sigmas[-1]) == (1, 0)
    assert (sigmas.diff() < 0).all()


def test_the_shift_by_hand():
    torch.testing.assert_close(sigma_schedule(4), torch.tensor([1, 0.75, 0.5, 0.25, 0]))
    torch.testing.assert_close(sigma_schedule(4, 3.0), torch.tensor([1, 0.9, 0.75, 0.5, 0]))
    sigmas = torch.rand(9, generator=seeded())
    torch.testing.assert_close(shift_sigmas(shift_sigmas(sigmas, 3.0), 1 / 3), sigmas)
    assert shift_sigmas(sigmas, 1.0).equal(sigmas)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shift", [dimension_shift(96, 1, 256), 6.928, 3.0, 1 / 3, 1e-6, 1e6])
def test_the_shift_stays_within_0_and_1(shift, dtype):
    """`sample` takes no σ above 1, not by one rounding either."""
    sigmas = torch.linspace(0, 1, 1001, dtype=dtype)
    shifted = shift_sigmas(sigmas, shift)
    assert shifted.dtype == dtype
    assert (shifted[0], shifted[-1]) == (0, 1)
    assert (shifted.min(), shifted.max()) == (0, 1)
    sample(toy, latents(1), shift_sigmas(torch.linspace(1, 0, 3), shift))


def test_the_mirrored_shift():
    """DDT's `shift_respace_fn`, t / (t + (1 − t) s), is the same map of t = 1 − σ."""
    t = torch.linspace(0, 1, 11)
    torch.testing.assert_close(1 - shift_sigmas(1 - t, 3.0), t / (t + (1 - t) * 3.0))


@pytest.mark.parametrize(("channels", "wanted"), [(96, 2.449), (32, 1.414), (768, 6.928)])
def test_dimension_shift(channels, wanted):
    """The paper's latents are 16 x 16."""
    assert dimension_shift(channels, 1, 256) == pytest.approx(wanted, abs=5e-4)
    assert dimension_shift(channels, 2, 64) == dimension_shift(channels, 1, 256)
    assert dimension_shift(channels, 1, 256, base=256 * channels) == 1


def test_sampled_sigmas_are_logit_normal():
    for mean, std in ((0.0, 1.0), (-0.8, 0.8)):
        logits = sample_sigmas(20000, mean=mean, std=std, generator=seeded()).double().logit()
        assert logits.mean() == pytest.approx(mean, abs=0.02)
        assert logits.std() == pytest.approx(std, abs=0.02)
    assert sample_sigmas(5).shape == (5,)


def test_sampled_sigmas_shift_after_the_sigmoid():
    plain, shifted = (sample_sigmas(1000, shift=shift, generator=seeded()) for shift in (1.0, 3.0))
    torch.testing.assert_close(shifted, shift_sigmas(plain, 3.0))
    assert (shifted.logit() - plain.logit()).mean() == pytest.approx(math.log(3.0), abs=1e-3)


def test_sampled_sigmas_follow_the_generator():
    first = sample_sigmas(8, generator=seeded(1))
    assert first.equal(sample_sigmas(8, generator=seeded(1)))
    assert not first.equal(sample_sigmas(8, generator=seeded(2)))
    generator = seeded(1)
    assert not sample_sigmas(8, generator=generator).equal(sample_sigmas(8, generator=generator))
    assert sample_sigmas(8, generator=seeded(1), device="cpu").equal(first)


# diffusers


def scheduler(**how):
    diffusers = pytest.importorskip("diffusers", reason="diffusers comes with psvae[diffusers]")
    made = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    made.set_timesteps(**how)
    return made


@pytest.mark.parametrize("num_steps", [1, 7, 50])
def test_diffusers_takes_the_same_steps(num_steps):
    import numpy as np

    theirs = scheduler(sigmas=np.linspace(1, 1 / num_steps, num_steps))
    torch.testing.assert_close(theirs.sigmas, sigma_schedule(num_steps, 3.0), rtol=0, atol=1e-6)

    def velocity(x, sigmas):
        return torch.sin(3 * x) + sigmas.view(-1, 1, 1, 1) * x

    state, ours = latents(2), []
    final = sample(velocity, state, sigma_schedule(num_steps, 3.0), callback=lambda *step: ours.append(step[2]))
    for timestep, wanted in zip(theirs.timesteps, ours, strict=True):
        state = theirs.step(velocity(state, timestep.expand(2) / 1000), timestep, state).prev_sample
        torch.testing.assert_close(wanted, state, rtol=1e-5, atol=1e-5)
    assert final.equal(ours[-1])


def test_diffusers_by_number_of_steps_takes_others():
    """As `sigma_schedule` says: the smallest σ is stored shifted, and shifted again."""
    theirs, ours = scheduler(num_inference_steps=50).sigmas, sigma_schedule(50, 3.0)
    assert (theirs - ours).abs().max() == pytest.approx(0.049, abs=0.001)


# Noise, velocity, clean latents


def test_the_ends_are_clean_and_noise():
    x, noise = latents(2), latents(2, seed=1)
    assert add_noise(x, noise, torch.zeros(2)).equal(x)
    assert add_noise(x, noise, torch.ones(2)).equal(noise)
    got = add_noise(x, noise, torch.tensor([0.25, 0.5]))
    torch.testing.assert_close(got[0], 0.75 * x[0] + 0.25 * noise[0])
    torch.testing.assert_close(got[1], 0.5 * x[1] + 0.5 * noise[1])


@pytest.mark.parametrize("shape", [(3, 2), (3, 4, 5), (3, 8, 4, 4)])
def test_identities(shape):
    x, noise = torch.randn(2, *shape, generator=seeded())
    sigmas = torch.tensor([0.1, 0.5, 1.0])
    noisy, velocity = add_noise(x, noise, sigmas), velocity_target(x, noise)
    assert velocity.equal(noise - x)
    torch.testing.assert_close(clean_latents(noisy, velocity, sigmas), x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(velocity_from_clean(noisy, x, sigmas), velocity, rtol=1e-5, atol=1e-5)
    ahead = add_noise(x, noise, sigmas - 0.1)
    torch.testing.assert_close(noisy - 0.1 * velocity, ahead, rtol=1e-5, atol=1e-5)  # v = dx/dσ


def test_velocity_from_clean_has_a_floor():
    x, clean = latents(2), latents(2, seed=1)
    got = velocity_from_clean(x, clean, torch.tensor([0.0, 0.01]))
    torch.testing.assert_close(got, (x - clean) / 0.05)
    torch.testing.assert_close(velocity_from_clean(x, clean, torch.zeros(2), floor=0.5), (x - clean) / 0.5)


def test_loss_and_its_reductions():
    velocity, x, noise = (latents(3, seed=seed) for seed in range(3))
    by_item = torch.stack([(velocity[i] - (noise[i] - x[i])).square().mean() for i in range(3)])
    torch.testing.assert_close(flow_loss(velocity, x, noise, reduction="none"), by_item)
    torch.testing.assert_close(flow_loss(velocity, x, noise), by_item.mean())
    assert flow_loss(noise - x, x, noise) == 0


def test_loss_is_in_fp32():
    velocity, x, noise = (latents(3, seed=seed).bfloat16() for seed in range(3))
    got = flow_loss(velocity, x, noise)
    assert got.dtype == torch.float32
    assert got.equal(flow_loss(velocity.float(), x.float(), noise.float()))  # the target too


# Sampling


def test_euler_calls_once_per_update_heun_twice_but_at_the_end():
    sigmas = sigma_schedule(5, 3.0)
    euler, heun = (Counted(lambda x, _: x) for _ in range(2))
    sample(euler, latents(2), sigmas)
    sample(heun, latents(2), sigmas, solver="heun")
    assert euler.sigmas == [[sigma, sigma] for sigma in sigmas[:-1].tolist()]
    assert len(heun.sigmas) == 2 * 5 - 1
    assert [0.0, 0.0] not in heun.sigmas


def test_heun_that_stops_early_corrects_its_last_update():
    velocity = Counted(lambda x, _: x)
    sample(velocity, latents(1), torch.tensor([1.0, 0.5, 0.25]), solver="heun")
    assert len(velocity.sigmas) == 2 * 2


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_order_of_convergence(solver, order):
    """dx/dσ = x cos 2σ: x_σ = x_1 exp(½ sin 2σ − ½ sin 2)."""

    def error(num_steps):
        sigmas = sigma_schedule(num_steps) * 0.9 + 0.1  # Heun's last update at σ = 0 would be Euler's
        got = sample(lambda x, s: x * torch.cos(2 * s)[:, None], torch.ones(1, 1), sigmas, solver=solver)
        return abs(got.item() - math.exp(0.5 * math.sin(0.2) - 0.5 * math.sin(2)))

    for num_steps in (16, 32):
        assert math.log2(error(num_steps) / error(2 * num_steps)) == pytest.approx(order, abs=0.15)


def test_a_straight_path_takes_one_step():
    x, noise = latents(2), latents(2, seed=1)
    torch.testing.assert_close(sample(lambda *_: noise - x, noise, sigma_schedule(1)), x)


def test_callback_sees_each_update():
    seen, noise = [], latents(2)
    sigmas = sigma_schedule(4, 3.0)
    final = sample(lambda x, _: x, noise, sigmas, callback=lambda *step: seen.append(step))
    assert [number for number, _, _ in seen] == [1, 2, 3, 4]
    assert [sigma for _, sigma, _ in seen] == sigmas[1:].tolist()
    torch.testing.assert_close(seen[0][2], noise * (1 + (sigmas[1] - sigmas[0])))
    assert seen[-1][2].equal(final)


def test_state_is_fp32_when_the_velocity_is_bf16():
    """Two hundred steps of 1/200 in bf16 would lose half of the way."""
    noise = torch.ones(1, 4, dtype=torch.bfloat16)
    velocity = Counted(lambda x, _: torch.ones_like(x))
    got = sample(velocity, noise, sigma_schedule(200), callback=lambda _, __, x: velocity.dtypes.append(x.dtype))
    assert got.dtype == torch.bfloat16
    assert got.abs().max() < 1e-4
    assert set(velocity.dtypes) == {(torch.bfloat16, torch.float32), torch.bfloat16}


def test_sampling_leaves_the_noise_alone_and_needs_no_gradient():
    noise, weight = latents(2), torch.ones(1, requires_grad=True)
    got = sample(lambda x, _: x * weight, noise, sigma_schedule(3), solver="heun")
    assert noise.equal(latents(2))
    assert not got.requires_grad


# Guidance


def three(batch=3):
    return tuple(latents(batch, seed=seed) for seed in range(3))


def test_classifier_free_by_hand():
    conditional, empty, _ = three()
    torch.testing.assert_close(classifier_free(conditional, empty, 6.5), 6.5 * conditional - 5.5 * empty)
    torch.testing.assert_close(classifier_free(conditional, empty, 1.0), conditional)
    assert classifier_free(conditional, empty, 0.0).equal(empty)


def test_dual_guidance_by_hand():
    full, image, other = three()
    nested = dual_guidance(full, image, other, text_scale=4.0, image_scale=1.5, form="nested")
    torch.testing.assert_close(nested, -0.5 * other + 1.5 * (-3.0 * image + 4.0 * full), rtol=1e-5, atol=1e-5)
    additive = dual_guidance(full, image, other, text_scale=4.0, image_scale=1.5, form="additive")
    torch.testing.assert_close(additive, -0.5 * other - 2.5 * image + 4.0 * full, rtol=1e-5, atol=1e-5)
    for form in ("nested", "additive"):
        plain = dual_guidance(full, image, other, text_scale=1.0, image_scale=1.0, form=form)
        torch.testing.assert_close(plain, full)


@pytest.mark.parametrize("over", ["global", "channel"])
@pytest.mark.parametrize("minimum", [0.0, 0.6])
def test_renormalise_by_hand(over, minimum):
    long, reference, _ = three()
    long[0] *= 5
    got = renormalise(long, reference, minimum, over)
    for item in range(3):
        axes = (0, 1, 2) if over == "global" else 0
        norms = [torch.linalg.vector_norm(x[item], dim=axes, keepdim=True) for x in (reference, long)]
        torch.testing.assert_close(got[item], long[item] * (norms[0] / norms[1]).clamp(minimum, 1))


@pytest.mark.parametrize("over", ["global", "channel"])
def test_renormalise_item_by_item(over):
    guided_velocity, reference, _ = three()
    guided_velocity = guided_velocity * torch.tensor([0.2, 1.0, 7.0]).view(3, 1, 1, 1)
    together = renormalise(guided_velocity, reference, 0.0, over)
    alone = [renormalise(guided_velocity[i : i + 1], reference[i : i + 1], 0.0, over) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone))
    axes = (1, 2, 3) if over == "global" else (1,)
    norms = [torch.linalg.vector_norm(x, dim=axes) for x in (together, reference, guided_velocity)]
    assert (norms[0] <= norms[1] * (1 + 1e-5)).all()  # never longer than the reference
    assert (norms[0] <= norms[2] * (1 + 1e-5)).all()  # nor lengthened
    if over == "global":
        torch.testing.assert_close(together[0], guided_velocity[0])  # shorter than the reference: as it was


def test_renormalise_of_nothing_and_of_bf16():
    zero, reference, _ = three()
    assert renormalise(torch.zeros_like(zero), reference, 0.0, "global").abs().max() == 0
    assert renormalise(zero.bfloat16(), reference.bfloat16(), 0.0, "channel").dtype == torch.bfloat16


def test_guidance_names_its_branches():
    assert Guidance().branches == ("full", "empty")
    assert Guidance(image_scale=1.5).branches == ("full", "image", "text")
    assert Guidance(image_scale=1.5, form="additive").branches == ("full", "image", "empty")


@pytest.mark.bad_input  # a list from JSON, where the annotation says tuple
def test_guidance_survives_json():
    guidance = Guidance(image_scale=1.5, interval=(0.4, 1.0), renorm="channel")
    assert Guidance.from_dict(json.loads(json.dumps(guidance.to_dict()))) == guidance


def test_combine_is_the_formulas():
    full, image, other = three()
    assert Guidance(scale=4.0).combine(full, other).equal(classifier_free(full, other, 4.0))
    for form in ("nested", "additive"):
        guidance = Guidance(scale=4.0, image_scale=1.5, form=form)
        wanted = dual_guidance(full, image, other, text_scale=4.0, image_scale=1.5, form=form)
        assert guidance.combine(full, image, other).equal(wanted)
        shortened = guidance.replace(renorm="channel", renorm_minimum=0.3).combine(full, image, other)
        assert shortened.equal(renormalise(wanted, full, 0.3, "channel"))


class Calls:
    """A model that counts the items of each forward."""

    def __init__(self, model):
        self.model, self.items = model, []

    def __call__(self, x, sigmas, prefix):
        self.items.append(len(x))
        return self.model(x, sigmas, prefix)


def empty(batch, next_position=0):
    """A prefix of no model."""
    nothing = torch.empty(1, batch, 1, 0, 8)
    return PrefixCache(nothing, nothing, None, torch.full((batch,), next_position))


def branches(model):
    """Of one edit for each of two items; their lengths differ, and those of the two instructions too."""
    ids, source = words(2, 7), latents(2, 2, 3, seed=9)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0]])
    with torch.no_grad():
        return {
            "full": model.encode_prefix(ids, mask, source_latents=source),
            "image": model.encode_prefix(source_latents=source),
            "text": model.encode_prefix(ids, mask),
            "empty": PrefixCache.empty(model.config, 2),
        }


GUIDANCES = (
    Guidance(scale=6.5),
    Guidance(scale=4.0, image_scale=1.5),
    Guidance(scale=4.0, image_scale=1.5, form="additive", renorm="global"),
)


@pytest.mark.parametrize("guidance", GUIDANCES, ids=lambda guidance: f"{guidance.branches}")
def test_batched_branches_equal_sequential_ones(guidance):
    model = Calls(tiny_model())
    prefixes, x, sigmas = branches(model.model), latents(2), torch.full((2,), 0.7)
    assert len({prefix.length for prefix in prefixes.values()}) == 4
    count = len(guidance.branches)
    with torch.no_grad():
        together = guided(model, prefixes, guidance)(x, sigmas)
        assert model.items == [2 * count]
        one_by_one = guided(model, prefixes, guidance, batched=False)(x, sigmas)
        assert model.items[1:] == [2] * count
        by_hand = guidance.combine(*(model(x, sigmas, prefixes[name]).sample for name in guidance.branches))
    torch.testing.assert_close(together, one_by_one, rtol=1e-5, atol=5e-5)  # the scale multiplies rounding too
    assert one_by_one.equal(by_hand)
    assert (together - model(x, sigmas, prefixes["full"]).sample).abs().max() > 1e-3


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 2, 0]])
def test_the_interval_is_asked_item_by_item(order, batched):
    """An item's σ decides, not that of the batch's first."""
    model, guidance = tiny_model(), Guidance(interval=(0.2, 0.8))
    x, ids, sigmas = latents(3)[order], words(3)[order], torch.tensor([0.1, 0.5, 0.9])[order]
    with torch.no_grad():
        prefixes = {"full": model.encode_prefix(ids), "empty": PrefixCache.empty(model.config, 3)}
        full, empty = (model(x, sigmas, prefixes[name]).sample for name in ("full", "empty"))
        got = guided(model, prefixes, guidance, batched=batched)(x, sigmas)
    inside, both = (sigmas == 0.5).view(-1, 1, 1, 1), classifier_free(full, empty, 6.5)
    wanted = torch.where(inside, both, full)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=5e-5)
    assert (both - full).abs().amax((1, 2, 3)).min() > 1e-2


def test_sigma_without_numbers_is_not_read():
    """On the meta device every branch is computed, whatever the interval."""
    calls = []

    def model(x, sigmas, prefix):
        calls.append(x.shape)
        return SimpleNamespace(sample=x)

    x, sigmas = latents(2).to("meta"), torch.ones(2, device="meta")
    for interval in ((0.0, 1.0), (0.2, 0.8)):
        velocity = guided(model, {name: empty(2) for name in ("full", "empty")}, Guidance(interval=interval))
        assert velocity(x, sigmas).shape == x.shape
    assert calls == [(4, *x.shape[1:])] * 2


@pytest.mark.compile
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.2, 0.8)])
def test_guidance_is_one_graph(interval):
    def model(x, sigmas, prefix):
        return SimpleNamespace(sample=torch.sin(x) * sigmas.view(-1, 1, 1, 1) + prefix.next_position.sum())

    prefixes = {name: empty(2, start) for start, name in enumerate(("full", "empty"))}
    velocity = guided(model, prefixes, Guidance(interval=interval), batched=False)
    x, sigmas = latents(2), torch.tensor([0.5, 0.9])
    torch.testing.assert_close(torch.compile(velocity, fullgraph=True)(x, sigmas), velocity(x, sigmas))


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("guidance", [None, Guidance(1.0), Guidance(1.0, image_scale=1.0, form="additive")])
def test_without_guidance_one_branch_is_enough(guidance, batched):
    model = Calls(tiny_model())
    prefix, x, sigmas = branches(model.model)["full"], latents(2), torch.tensor([0.3, 0.7])
    velocity = guided(model, {"full": prefix}, guidance, batched=batched)
    with torch.no_grad():
        assert velocity(x, sigmas).equal(model.model(x, sigmas, prefix).sample)
    assert model.items == [2]
    assert sample(velocity, x, sigma_schedule(2)).shape == x.shape
    assert guidance is None or guidance.branches == ("full",)


def test_a_scale_of_one_is_no_guidance():
    """What is left out would change nothing."""
    full, image, other = three()
    torch.testing.assert_close(classifier_free(full, other, 1.0), Guidance(1.0).combine(full))
    for form in ("nested", "additive"):
        left_out = dual_guidance(full, image, other, text_scale=1.0, image_scale=1.0, form=form)
        torch.testing.assert_close(left_out, Guidance(1.0, image_scale=1.0, form=form, renorm="global").combine(full))


@pytest.mark.parametrize("batched", [True, False])
def test_outside_the_interval_the_full_branch_alone(batched):
    """Above the lower end, up to and including the upper one."""
    model = Calls(tiny_model())
    prefixes = branches(model.model)
    velocity = guided(model, prefixes, Guidance(interval=(0.2, 0.8)), batched=batched)
    sample(velocity, latents(2), sigma_schedule(10))  # 1.0, 0.9, … 0.1
    inside = [4] if batched else [2, 2]
    assert model.items == [2, 2, *inside * 6, 2, 2]  # 0.8 to 0.3 are guided
    with torch.no_grad():
        x, sigmas = latents(2), torch.full((2,), 0.9)
        assert velocity(x, sigmas).equal(model(x, sigmas, prefixes["full"]).sample)


def test_guided_items_do_not_mix():
    model, guidance = tiny_model(), Guidance(scale=4.0, image_scale=1.5, renorm="global")
    x, source, ids = latents(3), latents(3, 2, 3, seed=9), words(3)

    def run(rows):
        prefixes = {
            "full": model.encode_prefix(ids[rows], source_latents=source[rows]),
            "image": model.encode_prefix(source_latents=source[rows]),
            "text": model.encode_prefix(ids[rows]),
        }
        return sample(guided(model, prefixes, guidance), x[rows], sigma_schedule(3))

    with torch.no_grad():
        alone = torch.cat([run(slice(item, item + 1)) for item in range(3)])
        torch.testing.assert_close(run(slice(None)), alone, rtol=1e-4, atol=1e-5)


# Other conventions


def toy(x, sigmas):
    """Any velocity."""
    return torch.sin(x) * (1 + sigmas.view(-1, 1, 1, 1)) - 0.3 * x


def test_sit_there_and_back():
    x, sigmas = latents(3), torch.tensor([0.1, 0.5, 1.0])
    torch.testing.assert_close(to_sit(from_sit(toy))(x, sigmas), toy(x, sigmas))
    torch.testing.assert_close(from_sit(to_sit(toy))(x, sigmas), toy(x, sigmas))
    torch.testing.assert_close(to_sit(toy)(x, 1 - sigmas), -toy(x, sigmas))


def test_a_sit_network_gives_the_same_image_both_ways():
    """Its own sampler climbs t from 0 to 1 along x − ε; a network trained on one pair of x and ε is known."""

    def network(x, t):
        return torch.cos(2 * x) + t.view(-1, 1, 1, 1)

    noise, steps = latents(2), 20
    theirs = noise
    for step in range(steps):
        theirs = theirs + network(theirs, torch.full((2,), step / steps)) / steps
    ours = sample(from_sit(network), noise, sigma_schedule(steps))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    back = sample(from_sit(to_sit(from_sit(network))), noise, sigma_schedule(steps))
    torch.testing.assert_close(back, theirs, rtol=1e-5, atol=1e-5)


def test_sit_points_from_noise_to_data():
    x, noise = latents(2), latents(2, seed=1)
    got = sample(from_sit(lambda *_: x - noise), noise, sigma_schedule(3))
    torch.testing.assert_close(got, x)


def test_lumina_gives_the_image_of_its_own_pipeline():
    diffusers = pytest.importorskip("diffusers", reason="diffusers comes with psvae[diffusers]")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = diffusers.Lumina2Transformer2DModel(
            sample_size=4, in_channels=8, hidden_size=24, num_layers=1, num_refiner_layers=1, num_attention_heads=2,
            num_kv_heads=1, multiple_of=8, axes_dim_rope=(4, 4, 4), axes_lens=(16, 8, 8), cap_feat_dim=12,
        ).eval()  # fmt: skip
    pipeline = diffusers.Lumina2Pipeline(
        transformer, diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), vae=None, text_encoder=None, tokenizer=None
    )
    pipeline.set_progress_bar_config(disable=True)
    noise, text, mask = latents(2), torch.randn(2, 5, 12, generator=seeded()), torch.ones(2, 5, dtype=torch.bool)
    (theirs,) = pipeline(
        prompt_embeds=text, prompt_attention_mask=mask, latents=noise, height=32, width=32, num_inference_steps=4,
        guidance_scale=1.0, output_type="latent", return_dict=False,
    )  # fmt: skip
    ours = sample(from_sit(lambda x, t: transformer(x, t, text, mask).sample), noise, sigma_schedule(4, 3.0))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_time_scale():
    """Z-Image counts to 1000."""
    times = []
    velocity = from_sit(lambda x, t: times.append(t) or x, time_scale=1000.0)
    velocity(latents(2), torch.tensor([0.25, 1.0]))
    torch.testing.assert_close(times[0], torch.tensor([750.0, 0.0]))


def test_jit_on_a_linear_toy():
    """For x ~ N(0, s²) the best x̂ is linear in x_σ, and so is the velocity: the same image by both."""
    spread = 0.5

    def clean(x, t):  # JiT: x_t = t x + (1 − t) ε
        return x * (t * spread**2 / (t**2 * spread**2 + (1 - t) ** 2)).view(-1, 1, 1, 1)

    def velocity(x, sigmas):
        t = 1 - sigmas
        return x * ((sigmas - t * spread**2) / (t**2 * spread**2 + sigmas**2)).view(-1, 1, 1, 1)

    noise, steps = latents(2), sigma_schedule(20)  # the last σ asked for is 0.05, the floor
    x, sigmas = latents(3), torch.tensor([0.05, 0.4, 1.0])
    torch.testing.assert_close(from_jit(clean)(x, sigmas), velocity(x, sigmas), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        sample(from_jit(clean), noise, steps), sample(velocity, noise, steps), rtol=1e-5, atol=1e-5
    )
    fine = sample(from_jit(clean, floor=1e-3), noise, sigma_schedule(400), solver="heun")
    torch.testing.assert_close(fine, noise * spread, rtol=2e-2, atol=0)  # ε ~ N(0, 1) goes to N(0, s²)


# Errors


@pytest.mark.parametrize("shift", [0.0, -1.0, float("nan"), float("inf")])
def test_shift_must_be_positive(shift):
    for call in (
        lambda: shift_sigmas(torch.rand(3), shift),
        lambda: sigma_schedule(3, shift),
        lambda: sample_sigmas(3, shift=shift),
    ):
        with pytest.raises(ConfigError, match=r"shift is .*; wanted a positive number, 1 for none"):
            call()


@pytest.mark.bad_input
@pytest.mark.parametrize("num_steps", [0, -3, 4.0, "4"])
def test_at_least_one_step(num_steps):
    with pytest.raises(ConfigError, match=f"num_steps is {num_steps!r}; wanted a whole number, at least 1"):
        sigma_schedule(num_steps)


@pytest.mark.parametrize(("mean", "std"), [(0.0, -1.0), (0.0, math.nan), (0.0, math.inf), (math.nan, 1.0)])
def test_the_spread_of_sampled_sigmas(mean, std):
    with pytest.raises(ConfigError, match=f"mean is {mean!r} and std {std!r}; wanted finite numbers, std at least 0"):
        sample_sigmas(3, mean=mean, std=std)


@pytest.mark.parametrize(
    "sigmas",
    [
        torch.linspace(0, 1, 5),
        torch.tensor([1.0, 0.5, 0.5, 0.0]),
        torch.tensor([1.0, float("nan"), 0.0]),
        torch.tensor([1.0]),
        torch.tensor([]),
    ],
    ids=["ascending", "level", "nan", "one", "none"],
)
def test_sigmas_must_descend(sigmas):
    with pytest.raises(ShapeError, match=r"wanted one descending row within \[0, 1\], as sigma_schedule\(50"):
        sample(toy, latents(2), sigmas)


@pytest.mark.bad_input
def test_sigmas_must_be_one_row():
    with pytest.raises(ShapeError, match=r"shape \(1, 6\)"):
        sample(toy, latents(2), sigma_schedule(5)[None])
    with pytest.raises(ShapeError, match=r"shape \(\)"):
        sample(toy, latents(2), torch.tensor(1.0))


@pytest.mark.bad_input
def test_sigmas_must_be_a_tensor():
    with pytest.raises(DtypeError, match=r"sigmas came as list; wanted a torch.Tensor, as sigma_schedule"):
        sample(toy, latents(2), [1.0, 0.5, 0.0])


@pytest.mark.parametrize(
    ("sigmas", "span"),
    [([1000.0, 500.0, 0.0], r"\[0, 1000\]"), ([1.01, 0.5, 0.0], r"\[0, 1.01\]"), ([1.0, 0.0, -0.1], r"\[-0.1, 1\]")],
)
def test_sigmas_of_another_scale(sigmas, span):
    with pytest.raises(ShapeError, match=rf"sigmas span {span}; wanted σ in \[0, 1\], .* divided by 1000"):
        sample(toy, latents(2), torch.tensor(sigmas))


def unread(*_):
    raise AssertionError("asked at what is no σ")


ON_SIGMA = {
    "add_noise": lambda sigmas: add_noise(latents(2), latents(2, seed=1), sigmas),
    "clean_latents": lambda sigmas: clean_latents(latents(2), latents(2, seed=1), sigmas),
    "velocity_from_clean": lambda sigmas: velocity_from_clean(latents(2), latents(2, seed=1), sigmas),
    "from_sit": lambda sigmas: from_sit(unread)(latents(2), sigmas),
    "to_sit": lambda sigmas: to_sit(unread)(latents(2), sigmas),
    "from_jit": lambda sigmas: from_jit(unread)(latents(2), sigmas),
    "guided": lambda sigmas: guided(unread, {"full": empty(2)}, None)(latents(2), sigmas),
}


@pytest.mark.bad_input
@pytest.mark.parametrize("call", ON_SIGMA)
@pytest.mark.parametrize(
    ("sigmas", "error", "said"),
    [
        (0.5, DtypeError, "sigmas came as float"),
        ([0.5, 0.5], DtypeError, "sigmas came as list"),
        (torch.tensor([0, 1]), DtypeError, "sigmas came as torch.int64"),
        (torch.tensor(0.5), ShapeError, r"sigmas have shape \(\)"),
        (torch.tensor([0.5]), ShapeError, r"sigmas have shape \(1,\)"),
        (torch.full((2, 1, 1, 1), 0.5), ShapeError, r"sigmas have shape \(2, 1, 1, 1\)"),
        (torch.full((4,), 0.5), ShapeError, r"sigmas have shape \(4,\)"),
    ],
    ids=["number", "list", "integers", "no axis", "one of two", "column", "four of two"],
)
def test_one_sigma_for_each_item(call, sigmas, error, said):
    wanted = r"; wanted one σ for each item, floating point, shape \(2,\): torch.full\(\(2,\), sigma\)"
    with pytest.raises(error, match=said + wanted):
        ON_SIGMA[call](sigmas)


@pytest.mark.parametrize("call", ON_SIGMA)
@pytest.mark.parametrize("high", [500.0, 1.0001, -0.1, math.nan, math.inf])
def test_sigma_lies_within_0_and_1(call, high):
    with pytest.raises(ShapeError, match=r"sigmas span .* wanted σ in \[0, 1\], 1 for noise: .* divided by 1000"):
        ON_SIGMA[call](torch.tensor([0.5, high]))


PAIRS = {
    "add_noise": lambda a, b: add_noise(a, b, torch.full((2,), 0.5)),
    "clean_latents": lambda a, b: clean_latents(a, b, torch.full((2,), 0.5)),
    "velocity_from_clean": lambda a, b: velocity_from_clean(a, b, torch.full((2,), 0.5)),
    "velocity_target": velocity_target,
    "flow_loss of the noise": lambda a, b: flow_loss(a, a, b),
    "flow_loss of the velocity": lambda a, b: flow_loss(b, a, a),
}


@pytest.mark.bad_input
@pytest.mark.parametrize("call", PAIRS)
def test_nothing_broadcasts(call):
    x = latents(2)
    for other in (x[:1], x[0], x.mean(1, keepdim=True), x.mT[..., :1]):
        with pytest.raises(
            ShapeError, match=r"the shapes differ: .*\(2, 8, 4, 4\).*; wanted one: nothing is broadcast"
        ):
            PAIRS[call](x, other)
    with pytest.raises(DtypeError, match=r"came as torch.int64; wanted a floating-point torch.Tensor"):
        PAIRS[call](x, torch.ones_like(x, dtype=torch.long))
    with pytest.raises(DtypeError, match=r"came as NoneType; wanted a floating-point torch.Tensor"):
        PAIRS[call](x, None)


def test_halves_and_singles_mix():
    x, noise, sigmas = latents(2), latents(2, seed=1), torch.full((2,), 0.5)
    assert add_noise(x.bfloat16(), noise, sigmas).shape == x.shape
    assert flow_loss(x.bfloat16(), x, noise).dtype == torch.float32


@pytest.mark.bad_input
def test_noise_is_floating_point():
    with pytest.raises(DtypeError, match=r"noise came as torch.int64; wanted a floating-point torch.Tensor"):
        sample(toy, torch.ones(2, 8, 4, 4, dtype=torch.long), sigma_schedule(2))


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("other", [lambda x: x[:1], lambda x: x[:, :4], lambda x: x.flatten(1)])
def test_the_velocity_has_the_shape_of_the_latents(other, solver):
    with pytest.raises(ShapeError, match=r"the shapes differ: latents \(2, 8, 4, 4\), velocity \("):
        sample(lambda x, _: other(x), latents(2), sigma_schedule(2), solver=solver)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_velocity_is_finite(value):
    def velocity(x, sigmas):
        return x.masked_fill(sigmas.view(-1, 1, 1, 1) < 0.5, value)

    with pytest.raises(ShapeError, match=r"the samples hold NaN or infinity; .* the noise or a velocity"):
        sample(velocity, latents(2), sigma_schedule(4))
    with pytest.raises(ShapeError, match="the samples hold NaN or infinity"):
        sample(toy, latents(2).masked_fill(latents(2) > 1, value), sigma_schedule(4))


@pytest.mark.bad_input
def test_a_model_is_no_velocity():
    model = tiny_model()
    with pytest.raises(
        DtypeError, match=r"a DeepFusionOutput; wanted a tensor: guided\(model, \{'full': prefix\}, None"
    ):
        sample(model, latents(2), sigma_schedule(2))


@pytest.mark.compile
def test_the_checks_break_no_graph():
    @torch.compile(fullgraph=True, dynamic=True)
    def step(x, noise, sigmas):
        noisy = add_noise(x, noise, sigmas)
        velocity = velocity_from_clean(noisy, clean_latents(noisy, noise - x, sigmas), sigmas)
        return flow_loss(velocity, x, noise)

    for batch in (2, 3, 5):
        assert step(latents(batch), latents(batch, seed=1), torch.full((batch,), 0.5)) < 1e-6


@pytest.mark.bad_input
def test_misspelt_choices():
    full, image, other = three()
    with pytest.raises(ConfigError, match="reduction is 'sum'; wanted 'mean' or 'none'"):
        flow_loss(full, image, other, reduction="sum")
    with pytest.raises(ConfigError, match="solver is 'huen'; wanted 'euler' or 'heun'"):
        sample(toy, full, sigma_schedule(2), solver="huen")
    with pytest.raises(ConfigError, match="form is 'bagel'; wanted 'nested' or 'additive'"):
        dual_guidance(full, image, other, text_scale=4.0, image_scale=1.5, form="bagel")
    with pytest.raises(ConfigError, match="over is 'text_channel'; wanted 'global' or 'channel'"):
        renormalise(full, image, 0.0, "text_channel")


@pytest.mark.parametrize(
    ("guidance", "given", "lost"),
    [
        (Guidance(), ("full",), "empty is missing"),
        (Guidance(), ("empty",), "full is missing"),
        (Guidance(image_scale=1.5), ("full", "empty"), "image, text is missing"),
        (Guidance(image_scale=1.5, form="additive"), ("full", "image", "text"), "empty is missing"),
    ],
)
def test_a_missing_branch(guidance, given, lost):
    model = tiny_model()
    prefixes = {name: prefix for name, prefix in branches(model).items() if name in given}
    with pytest.raises(ConfigError, match=f"guidance needs {', '.join(guidance.branches)}, of which {lost}"):
        guided(model, prefixes, guidance)


@pytest.mark.bad_input
def test_branches_come_by_name():
    model = tiny_model()
    found = branches(model)
    with pytest.raises(DtypeError, match=r"prefixes came as PrefixCache; wanted them by branch"):
        guided(model, found["full"], Guidance())
    with pytest.raises(ConfigError, match="prefixes came for full, uncond; guidance needs full, empty"):
        guided(model, {"full": found["full"], "uncond": found["empty"]}, Guidance())


@pytest.mark.bad_input
def test_a_branch_that_is_none():
    model = tiny_model()
    prefixes = branches(model) | {"empty": None}
    with pytest.raises(ConfigError, match="guidance needs full, empty, of which empty is missing"):
        guided(model, prefixes, Guidance())


@pytest.mark.parametrize("batched", [True, False])
def test_branches_are_of_one_batch(batched):
    """3 + 1 is twice 2 as well."""
    model = tiny_model()
    with torch.no_grad():
        prefixes = {"full": model.encode_prefix(words(3)), "empty": PrefixCache.empty(model.config, 1)}
    with pytest.raises(ShapeError, match="the prefixes are for batches of unequal size: full 3, empty 1; wanted one"):
        guided(model, prefixes, Guidance(), batched=batched)
    prefixes["empty"] = PrefixCache.empty(model.config, 3)
    with pytest.raises(ShapeError, match=r"the prefix is for a batch of 3; wanted 2, as the latents: .*repeat_inter"):
        guided(model, prefixes, Guidance(), batched=batched)(latents(2), torch.full((2,), 0.5))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"interval": (0.5, 0.2)}, r"Guidance.interval is \(0.5, 0.2\); wanted two values of σ"),
        ({"interval": (0.5, 0.5)}, "Guidance.interval"),
        ({"interval": (400.0, 1000.0)}, "Guidance.interval"),
        ({"interval": (0.4,)}, "Guidance.interval"),
        ({"renorm_minimum": -0.1}, "Guidance.renorm_minimum is -0.1; wanted 0 to 1"),
        ({"renorm_minimum": 1.5}, "Guidance.renorm_minimum"),
        ({"form": "bagel"}, "Guidance.form"),
        ({"renorm": "text_channel"}, "Guidance.renorm"),
        ({"scale": float("nan")}, "Guidance.scale"),
        ({"scale": "6.5"}, "Guidance.scale"),
    ],
)
def test_fields_of_guidance(fields, message):
    with pytest.raises(ConfigError, match=message):
        Guidance(**fields)
