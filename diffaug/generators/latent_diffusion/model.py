"""Latent diffusion (Rombach et al. 2022, arXiv 2112.10752) with MONAI's networks as a model: those of MONAI's
bundles, of MAISI (Guo et al. 2024, arXiv 2409.11169) and of NV-Generate.

Latents are `(B, Z, i, j, k)`, axes as the grid's, scaled as the denoiser sees them.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from diffaug.generators.diffusion import ScaledLinearSchedule
from diffaug.generators.hardware import exact_float32
from diffaug.generators.latent_diffusion import slabs
from diffaug.generators.latent_diffusion.memory import require_memory
from diffaug.generators.latent_diffusion.networks import FlowProcess, LatentDiffusionNetworks
from diffaug.generators.model import Model, Sampling, latent_mask
from diffaug.generators.processes import DiscreteDiffusion, Process, RectifiedFlow
from diffaug.generators.seeds import CaseNoise
from diffaug.generators.windows import Shape3, over_windows

# Both are given to MAISI's networks times this.
INPUT_SCALE = 100.0
REGIONS = 4
# The modality of no modality, towards which guidance looks back.
UNKNOWN = 0
ADVICE = (
    "give the generator a smaller networks.window (of the latent, for the autoencoder) in its card.json, or "
    "import it with a smaller --shape"
)


class LatentDiffusion(Model):
    """Sampling, varying and inpainting in latent space; painting of label maps where there is a control."""

    stored_as = torch.float32

    def __init__(self, networks: LatentDiffusionNetworks) -> None:
        super().__init__()
        self.networks = networks
        self.files = {
            "autoencoder.safetensors": "autoencoder.",
            "denoiser.safetensors": "denoiser.",
        }
        self.autoencoder: nn.Module = networks.autoencoder.build()
        self.denoiser = networks.denoiser.build()
        self.control: nn.Module | None = None
        if networks.control is not None:
            self.control = networks.control.build(networks.denoiser)
            self.files["control.safetensors"] = "control."
        self.process: Process
        if isinstance(networks.process, FlowProcess):
            self.process = RectifiedFlow(networks.process.steps)
        else:
            own = networks.process
            schedule = ScaledLinearSchedule(own.steps, own.beta_start, own.beta_end)
            self.process = DiscreteDiffusion(schedule, clip=False, inner=False)
        self.eval().requires_grad_(False)

    @property
    def image_latent(self) -> tuple[int, ...]:
        return self.networks.autoencoder.latent_channels, *self.networks.latent_shape

    # -- autoencoder, whose intensities are 0 to 1 -----------------------------------------------------------

    def encode_image(self, image: Tensor) -> Tensor:
        # The mean of the posterior: a draw from it would move what is to be preserved.
        z = self._over_windows(slabs.encode, (image + 1) / 2, encoding=True)
        return z * self.networks.scale_factor

    def decode_image(self, latent: Tensor) -> Tensor:
        z = latent / self.networks.scale_factor
        return 2 * self._over_windows(slabs.decode, z, encoding=False) - 1

    def _over_windows(
        self, function: Callable[[nn.Module, Tensor], Tensor], volume: Tensor, *, encoding: bool
    ) -> Tensor:
        window, factors = self.networks.autoencoder_window, self.networks.downsampling
        none: Shape3 = (1, 1, 1)
        require_memory(len(volume) * self.networks.autoencoder_bytes, volume.device, ADVICE)
        with exact_float32():
            scale = (factors, none) if encoding else (none, factors)
            return over_windows(
                lambda part: function(self.autoencoder, part), [volume.float()], window, scale
            )[0]

    # -- label maps ------------------------------------------------------------------------------------------

    def encode_label(self, label: Tensor) -> Tensor:
        """The bits of the ids, lowest first: float32 `(B, bits, I, J, K)`."""
        control = self.networks.control
        if control is None:
            return super().encode_label(label)
        ids = torch.tensor(self.networks.label_ids, device=label.device)[label.long()]
        return torch.cat([(ids >> bit) & 1 for bit in range(control.bits)], dim=1).float()

    # -- trajectories ----------------------------------------------------------------------------------------

    def sample(self, noise: CaseNoise, sampling: Sampling) -> tuple[Tensor, Tensor]:
        latent = self._make(None, noise, sampling)
        return latent, latent[:, :0]

    def paint(self, condition: Tensor, noise: CaseNoise, sampling: Sampling) -> Tensor:
        return self._make(condition, noise, sampling)

    def vary(
        self, clean: Tensor, strength: float, condition: Tensor, noise: CaseNoise, sampling: Sampling
    ) -> Tensor:
        return self._make(condition, noise, sampling, clean=clean, strength=strength)

    def inpaint(
        self, image: Tensor, mask: Tensor, condition: Tensor, noise: CaseNoise, sampling: Sampling
    ) -> Tensor:
        """The trajectory follows the noised latent of the image outside the mask."""
        region = latent_mask(mask, self.networks.downsampling)
        return self._make(condition, noise, sampling, clean=self.encode_image(image), mask=region)

    def _make(
        self,
        condition: Tensor | None,
        noise: CaseNoise,
        sampling: Sampling,
        *,
        clean: Tensor | None = None,
        strength: float | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """A latent; `condition` holds the bits of a label map, or no channels."""
        if condition is not None and not condition.shape[1]:
            condition = None
        flows = isinstance(self.process, RectifiedFlow)
        # MONAI's velocities lead from noise to data.
        sign, time_scale = (-1.0, self.networks.process.steps) if flows else (1.0, 1)

        def predict(x: Tensor, time: float) -> Tensor:
            times = torch.full((len(x),), time * time_scale, device=x.device)
            told = self._predict(x, times, condition, sampling.parameters)
            if sampling.guidance != 1.0:
                free = dict(sampling.parameters) | {"modality": UNKNOWN}
                untold = self._predict(x, times, condition, free)
                told = untold + sampling.guidance * (told - untold)
            return sign * told

        start = noise.draw(self.image_latent)
        # Said before the trajectory, which takes most of the time.
        require_memory(len(start) * self.networks.working_bytes, start.device, ADVICE)
        with exact_float32():
            return self.process.make(
                predict, start, noise, sampling, clean=clean, strength=strength, mask=mask
            )

    def _predict(
        self, x: Tensor, times: Tensor, condition: Tensor | None, parameters: Mapping[str, float]
    ) -> Tensor:
        """What the denoiser says of `x` at the networks' `times` `(B,)`."""
        networks, sizes = self.networks, self.networks.denoiser
        shared: dict[str, Tensor] = {}
        if sizes.num_class_embeds is not None:
            shared["class_labels"] = torch.full((len(x),), int(parameters["modality"]), device=x.device)
        seen, inputs = x, {}
        if networks.conditions:
            values = x.new_tensor([parameters[name] for name in networks.conditions]).expand(len(x), -1)
            seen = torch.cat([x, values[:, :, None, None, None].expand(-1, -1, *x.shape[2:])], dim=1)
            if sizes.with_conditioning:
                shared["context"] = values[:, None]
        if sizes.include_spacing_input:
            inputs["spacing_tensor"] = INPUT_SCALE * x.new_tensor([networks.spacing] * len(x))
        if sizes.regions:
            for end in ("top", "bottom"):
                region = x.new_zeros(len(x), REGIONS)
                region[:, int(parameters[f"{end}_region"])] = INPUT_SCALE
                inputs[f"{end}_region_index_tensor"] = region
        if self.control is not None and condition is not None:
            down, middle = self.control(seen, times, controlnet_cond=condition, **shared)
            inputs |= {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        return self.denoiser(seen, times, **shared, **inputs)
