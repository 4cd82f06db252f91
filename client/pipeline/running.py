"""One call of a pipeline: words and pictures to a generation."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from xditd.client.client import Client
from xditd.client.jobs.checks import check_conditioning, floats_of
from xditd.client.jobs.controls import Control
from xditd.client.jobs.generation import draw_seed
from xditd.client.loans import Loan, LoanWithLoras
from xditd.client.loras.spelling import read_name
from xditd.client.pipeline.adapter import MAX_LENGTH, Adapter, Plan
from xditd.client.pipeline.calls import Call
from xditd.client.pipeline.job import Ended, PipelineJob
from xditd.client.pipeline.loading import Loans
from xditd.client.pipeline.settings import RunSettings, UsedLora
from xditd.client.pipeline.sources import IMAGE_ENCODER, SECOND, TRANSFORMER, VAE, Source
from xditd.client.waiting import check_deadline
from xditd.ipc.errors import BadRequest, Unsupported
from xditd.ipc.facts import ArgumentFacts
from xditd.ipc.name_lists import listed

if TYPE_CHECKING:
    import torch
    from PIL import Image


class Runner:
    """Starts calls on the loans of a pipeline. ``parts`` are those by role: another thread may end them meanwhile."""

    def __init__(
        self, client: Client, source: Source, loans: Loans, parts: Mapping[str, Loan], adapter: Adapter
    ) -> None:
        self._client = client
        self._source = source
        self._loans = loans
        self._parts = parts
        self._adapter = adapter
        self._ends_s: float | None = None
        """When the call has to have ended, as ``time.monotonic`` counts."""

    def start(self, call: Call, *, previews: bool, deadline_s: float | None, ended: Ended) -> PipelineJob:
        """Encode words and pictures, and start the generation.

        Raises:
            BadRequest: an argument that the model cannot honour; names it.
            Unsupported: words, and the pipeline has no text encoders or tokenizers.
            XditdError: as :meth:`Client.generate`.
        """
        check_deadline(deadline_s)
        self._ends_s = None if deadline_s is None else time.monotonic() + deadline_s
        adapter, parts = self._adapter, self._parts
        negatives, scale = self._guidance(call)
        transformer, second, encoder_loras, used_loras = self._with_loras(call)
        plan = adapter.plan(call, self._encode_picture, self._see_picture)
        if call.conditioning is None:
            texts = self._encode_words(call, negatives, plan, transformer, encoder_loras)
        else:
            texts = dict(call.conditioning)
        conditioning = {**self._for_images(texts, call.num_images), **plan.conditioning}
        controls = self._controls(call)
        seed = draw_seed() if call.seed is None else call.seed
        options = {**adapter.options(), **(call.options or {})}
        steps = call.steps or (call.defaults["steps"] if call.sigmas is None else _steps_of(call.sigmas))
        strength = 1.0 if plan.start_image is None else adapter.strength(call)
        is_unshifted = call.sigmas is not None and not adapter.shifts_sigmas
        scheduler = None if is_unshifted else self._source.scheduler
        job = self._client.generate(
            transformer,
            conditioning,
            vae=parts.get(VAE),
            height=plan.height,
            width=plan.width,
            frames=plan.frames,
            transformer_2=second,
            steps=steps,
            sigmas=call.sigmas,
            guidance_scale=scale,
            seed=seed,
            previews="image" if previews else False,
            step_cache=call.step_cache,
            variant=self._source.variant,
            options=options,
            controls=controls,
            scheduler=scheduler,
            start_image=plan.start_image,
            start_mask=plan.start_mask,
            strength=strength,
            deadline_s=self._rest_s(),
        )
        settings = self._settings(
            call,
            plan,
            negatives=negatives,
            steps=steps,
            guidance=scale,
            seed=seed,
            batch=check_conditioning(conditioning, adapter.facts.conditioning),
            strength=strength,
            options=options,
            scheduler=scheduler,
            loras=used_loras,
        )
        return PipelineJob(job, settings, ended)

    def _guidance(self, call: Call) -> tuple[Sequence[str] | None, float]:
        """Return the negative prompt of each prompt, unless there are none, and the guidance scale."""
        adapter, default = self._adapter, self._adapter.default_guidance(call)
        negatives: Sequence[str] | None = call.negatives
        if call.conditioning is not None:
            return negatives, default if call.guidance is None else float(call.guidance)
        usual = call.defaults.get("negative_prompt")
        if negatives is None and usual is not None and adapter.is_guided(call.guidance, default):
            negatives = (str(usual),) * len(call.prompts)
        scale, is_guided = adapter.guidance(call.guidance, default, negatives)
        if is_guided and negatives is None:
            negatives = (adapter.empty_negative or "",) * len(call.prompts)
        return negatives, scale

    def _settings(
        self,
        call: Call,
        plan: Plan,
        *,
        negatives: Sequence[str] | None,
        steps: int,
        guidance: float,
        seed: int,
        batch: int,
        strength: float,
        options: Mapping[str, Any],
        scheduler: Mapping[str, Any] | None,
        loras: tuple[UsedLora, ...],
    ) -> RunSettings:
        """Return what the result and its record say of the call: as it was given, and as it runs."""
        return RunSettings(
            model=self._source.name,
            family=self._parts[TRANSFORMER].family,
            prompts=call.prompts,
            prompts_2=call.prompts_2 or (),
            negative_prompts=tuple(negatives or ()),
            width=plan.width,
            height=plan.height,
            frames=plan.frames,
            fps=int(call.defaults["fps"]),
            steps=steps,
            guidance=guidance,
            num_images=call.num_images,
            seed=seed,
            batch=batch,
            strength=strength,
            max_sequence_length=self._adapter.length(call) if call.conditioning is None else None,
            step_cache=call.step_cache,
            options=options,
            scheduler=scheduler,
            variant=self._source.variant,
            files={role: (part.path,) for role, part in self._source.parts.items()},
            lent_ns={role: loan.lent_ns for role, loan in self._parts.items()},
            loras=loras,
            has_image=call.image is not None,
            has_mask=call.mask is not None,
            references=len(call.references),
            has_control=call.control is not None,
            has_last_image=call.last_image is not None,
            has_sigmas=call.sigmas is not None,
            refused=frozenset(self._adapter.refused()),
        )

    def _rest_s(self) -> float | None:
        return None if self._ends_s is None else max(0.0, self._ends_s - time.monotonic())

    # --- Words ---------------------------------------------------------------------------------------

    def _encode_words(
        self,
        call: Call,
        negatives: Sequence[str] | None,
        plan: Plan,
        transformer: Loan | LoanWithLoras,
        encoder_loras: Sequence[tuple[Loan, Any, str]],
    ) -> Mapping[str, Any]:
        facts = self._adapter.facts.prompt
        if facts is None:
            raise Unsupported(
                f"prompt: workers encode no words for {self._adapter.title}; give conditioning= in place of the prompt"
            )
        length = self._adapter.length(call)
        options = plan.text_options | ({} if length is None else {MAX_LENGTH: length})
        classes = facts.image_tokenizers if plan.text_images else facts.tokenizers
        encoders = self._loans.encoders(self._parts, facts.encoders)
        seconds = None if call.prompts_2 is None else list(call.prompts_2)
        texts: Mapping[str, Any] = self._client.encode_prompt(
            transformer,
            list(call.prompts),
            prompt_2=seconds,
            negative_prompt=None if negatives is None else list(negatives),
            images=list(plan.text_images),
            options=options or None,
            encoders={role: with_those_of(loan, encoder_loras) for role, loan in encoders.items()},
            tokenizers=self._loans.tokenizers(classes),
            deadline_s=self._rest_s(),
        )
        return texts

    def _for_images(self, texts: Mapping[str, Any], count: int) -> dict[str, Any]:
        """Repeat what each prompt has for its ``count`` pictures."""
        takes: Mapping[str, ArgumentFacts] = self._adapter.takes
        if count == 1:
            return dict(texts)
        found: dict[str, Any] = {}
        for name, value in texts.items():
            facts = takes.get(name)
            if facts is None or facts.is_shared or value is None:
                found[name] = value
            elif facts.is_list:
                found[name] = [each for each in value for _ in range(count)]
            elif facts.shape[:1] == ("batch",):
                found[name] = value.repeat_interleave(count, dim=0)
            else:
                found[name] = value
        return found

    # --- LoRAs ---------------------------------------------------------------------------------------

    def _with_loras(
        self, call: Call
    ) -> tuple[Loan | LoanWithLoras, Loan | LoanWithLoras | None, list[tuple[Loan, Any, str]], tuple[UsedLora, ...]]:
        """Return the transformers with their LoRAs, all LoRAs with strengths and roles, for text encoders, and uses.

        Raises:
            BadRequest: no pair of a LoRA and a strength, or with two transformers no role.
        """
        parts = self._parts
        second = parts.get(SECOND)
        by_role: dict[str, list[tuple[Loan | str, Any]]] = {TRANSFORMER: [], SECOND: []}
        every: list[tuple[Loan, Any, str]] = []
        used: list[UsedLora] = []
        for given in call.loras:
            if not isinstance(given, tuple | list) or len(given) not in (2, 3):
                raise BadRequest(f"loras: {given!r:.100}; give pairs, [('x.safetensors', 0.8)]")
            source, strength, *role = given
            if second is not None and not role:
                raise BadRequest(
                    f"loras: {self._source.name} has two transformers; say which one has {_path_of(source)}: "
                    f"(path, strength, '{TRANSFORMER}') or (path, strength, '{SECOND}')"
                )
            wanted = role[0] if role else TRANSFORMER
            if wanted not in by_role or (wanted == SECOND and second is None):
                raise BadRequest(f"loras: {wanted!r} is no transformer of {self._source.name}")
            loan = self._loans.lora(source)
            every.append((loan, strength, wanted))
            _check_text_layers(loan, _path_of(source))
            families = {} if loan.facts.lora is None else loan.facts.lora.families
            self._check_encoders(loan, _path_of(source))
            roles = tuple(encoder for encoder in self._source.encoders if parts[encoder].family in families)
            if call.conditioning is not None:  # encoders read nothing
                roles = ()
            if parts[wanted].family in families or not roles:
                by_role[wanted].append((loan, strength))
                roles = (wanted, *roles)
            used.append(UsedLora(_path_of(source), strength, roles, loan.lent_ns))
        first = parts[TRANSFORMER]
        lent = first.with_loras(by_role[TRANSFORMER]) if by_role[TRANSFORMER] else first
        if second is not None and by_role[SECOND]:
            return lent, second.with_loras(by_role[SECOND]), every, tuple(used)
        return lent, second, every, tuple(used)

    def _check_encoders(self, lora: Loan, path: str) -> None:
        """Refuse a LoRA with layers of a text encoder that the pipeline does not have: they would have no effect.

        Raises:
            Unsupported: names the file and the families.
        """
        own = {self._parts[role].family for role in self._source.encoders}
        for families in () if lora.facts.lora is None else lora.facts.lora.text_encoders:
            if not own & set(families):
                raise Unsupported(
                    f"loras: {path}: it has layers of a text encoder ({' or '.join(families)}), and "
                    f"{self._source.name} has none of these: give it by text_encoders= (--text-encoder in the shell), "
                    "or remove the layers from the file"
                )

    # --- Pictures ------------------------------------------------------------------------------------

    def _encode_picture(self, pixels: torch.Tensor) -> torch.Tensor:
        vae = self._parts.get(VAE)
        if vae is None:
            raise Unsupported(f"references: {self._source.name} was opened without a VAE to encode them; give vae=")
        return self._client.encode(vae, pixels, transformer=self._parts[TRANSFORMER], deadline_s=self._rest_s())

    def _see_picture(self, picture: Image.Image) -> torch.Tensor:
        encoder = self._parts.get(IMAGE_ENCODER)
        if encoder is None:
            raise Unsupported(
                f"image: {self._source.name} needs the image encoder (CLIP vision) beside its transformer; give "
                "image_encoder= to Pipeline.open (--image-encoder in the shell)"
            )
        from xditd.client.pipeline.clip_pictures import clip_pixels

        arguments = {"pixel_values": clip_pixels(picture), "output_hidden_states": True}
        states: torch.Tensor = self._client.call(encoder, arguments, deadline_s=self._rest_s())["hidden_states"][-2]
        return states

    def _controls(self, call: Call) -> Sequence[Control]:
        if call.control is None or "control_image" in self._adapter.takes or "video" in self._adapter.takes:
            return ()
        given = call.control if isinstance(call.control, list | tuple) else [call.control]
        if not all(isinstance(each, Control) for each in given):
            raise BadRequest(
                f"control: {self._adapter.title} takes ControlNets; give Control(client.lend(file), picture), "
                "or a list of them; in the shell, --control FILE=PICTURE"
            )
        return list(given)


def with_those_of(encoder: Loan, loras: Sequence[tuple[Loan, Any, str]]) -> Loan | LoanWithLoras:
    """Return a text encoder with the LoRAs that have layers of it, each of both transformers once.

    Raises:
        BadRequest: one has other strengths for the second transformer than for the first.
    """
    own = [each for each in loras if each[0].facts.lora is not None and encoder.family in each[0].facts.lora.families]
    by_role = {role: [(loan, strength) for loan, strength, its in own if its == role] for role in (TRANSFORMER, SECOND)}
    strengths = {
        role: {
            loan.component_id: [each for other, each in given if other.component_id == loan.component_id]
            for loan, _ in given
        }
        for role, given in by_role.items()
    }
    for component_id, given in strengths[SECOND].items():
        before = strengths[TRANSFORMER].get(component_id)
        if before is not None and before != given:
            raise BadRequest(
                f"loras: one of both transformers has layers of the text encoder {encoder.family}, and the strengths "
                f"{before!r:.100} and {given!r:.100}; give equal ones, or a file without these layers"
            )
    used = by_role[TRANSFORMER] + [
        each for each in by_role[SECOND] if each[0].component_id not in strengths[TRANSFORMER]
    ]
    return encoder.with_loras(used) if used else encoder


def _check_text_layers(lora: Loan, path: str) -> None:
    """Refuse a LoRA with layers of a text encoder that takes none, such as a language model.

    Raises:
        Unsupported: names the file and the layers.
    """
    unknown = () if lora.facts.lora is None else lora.facts.lora.unknown
    of_text = [name for name in unknown if (read := read_name(name)) is not None and read.part == "text_encoder"]
    if of_text:
        raise Unsupported(
            f"loras: {path}: its layers of a text encoder, {listed(of_text)}, are of none that takes LoRAs (CLIP-L, T5 "
            "and UMT5 do): merge them into the text encoder, or remove them from the file"
        )


def _path_of(given: Any) -> str:
    return given.label if isinstance(given, Loan) else str(given)


def _steps_of(sigmas: Any) -> int:
    """Return how many steps a schedule has; a final 0, which is refused later, is none."""
    values = floats_of("sigmas", sigmas)
    return max(1, len(values) - (values[-1:] == (0.0,)))
