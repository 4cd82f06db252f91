"""A model family of an installed package, through a real daemon: lent, told of, called, generated with, refused."""

from __future__ import annotations

import pytest
import torch

from xditd.client import BadCheckpoint, BadRequest, UnknownFamily

SCALE = torch.tensor([0.5, -1.0, 2.0, 0.25])
SIGMAS = (1.0, 0.75, 0.5, 0.25)
BAR = 1e-6


@pytest.mark.slow
def test_a_family_of_another_package_is_served_as_our_own(package_daemon):
    with package_daemon.connect() as client:
        loan = client.lend({"scale.weight": SCALE}, kind="transformer", label="scale")
        assert (loan.family, loan.facts.class_name, loan.facts.transformer.latents.channels) == ("scale", "Scale", 4)
        status = client.status()
        assert [(component.label, component.facts.family) for component in status.components] == [("scale", "scale")]
        assert [worker.loaded for worker in status.workers] == [1, 1]

        sample, prompt = torch.randn(2, 4, 3, 5), torch.randn(2, 4)
        (result,) = client.call(loan, {"sample": sample, "prompt": prompt})
        assert torch.equal(result, forward(sample, prompt))
        parts = [{"sample": sample[:1], "prompt": prompt[:1]}, {"sample": sample[1:, :, :2], "prompt": prompt[1:]}]
        for (found,), part in zip(client.call_parts(loan, parts), parts, strict=True):
            assert torch.equal(found, forward(**part))
        with pytest.raises(BadRequest, match=r"prompt: shape is \[1, 4\], use \[2, 4\]"):
            client.call(loan, {"sample": sample, "prompt": client.keep(prompt[:1])})

        noise = torch.randn(1, 4, 2, 3)
        given = {"prompt": prompt[:1]}
        job = client.generate(loan, given, height=16, width=24, noise=noise, sigmas=SIGMAS, previews=True)
        for (sigma, then), _ in zip(zip(SIGMAS, (*SIGMAS[1:], 0.0), strict=True), job, strict=True):
            noise = noise + (then - sigma) * forward(noise, prompt[:1])
        torch.testing.assert_close(job.result().latents, noise)

        with pytest.raises(BadCheckpoint, match=r"odd: checkpoint does not fit scale: .*1 unexpected: other\.weight"):
            client.lend({"scale.weight": SCALE, "other.weight": SCALE}, kind="transformer", label="odd")
        with pytest.raises(UnknownFamily, match=r"or a scale of the tests \(scale\.safetensors\)"):
            client.lend({"other.weight": SCALE}, kind="transformer")
        loan.return_()
        assert [worker.loaded for worker in client.status().workers] == [0, 0]


@pytest.mark.long
@pytest.mark.slow
def test_its_latents_are_decoded_and_encoded_by_its_own_scaling(package_daemon, files, relative_error):
    """FLUX.1's VAE stands for one that looks like it; the numbers of the latents are SD3's."""
    from xditd.gpu_workers.families.flux1 import reference

    plain = reference.load_vae(files.vae)
    generator = torch.Generator().manual_seed(0)
    given = {"height": 48, "width": 64, "sigmas": SIGMAS, "noise": torch.randn(1, 16, 6, 8, generator=generator)}
    with package_daemon.connect() as client, client.lend(files.vae) as vae:
        scale = client.lend({"scale.weight": SCALE.repeat(4)}, kind="transformer", label="scale")
        narrow = client.lend({"scale.weight": SCALE}, kind="transformer", label="narrow")
        result = client.generate(scale, {"prompt": torch.zeros(1, 16)}, vae=vae, **given).result()
        with torch.no_grad():
            image = plain.decode(result.latents / 1.5305 + 0.0609).sample.clamp(-1, 1)
            encoded = (plain.encode(image).latent_dist.mode() - 0.0609) * 1.5305
        assert relative_error(result.image, image) <= BAR
        assert relative_error(client.decode(vae, result.latents, transformer=scale), image) <= BAR
        assert relative_error(client.encode(vae, image, transformer=scale), encoded) <= BAR
        assert relative_error(client.decode(vae, result.latents), image) > 1000 * BAR

        small = {**given, "noise": torch.zeros(1, 4, 6, 8)}
        with pytest.raises(BadRequest, match="vae: its latents have 16 channels, the transformer's 4; lend that model"):
            client.generate(narrow, {"prompt": torch.zeros(1, 4)}, vae=vae, **small).result()
        again = client.generate(scale, {"prompt": torch.zeros(1, 16)}, vae=vae, **given).result()
        assert torch.equal(again.image, result.image)


def forward(sample: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
    return sample * SCALE[:, None, None] + prompt[:, :, None, None]
