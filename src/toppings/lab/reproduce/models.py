"""Fig. 11: performance models of decode steps, fitted on this machine."""

from pathlib import Path

from toppings.lab.batches.figures import draw_batch_profile
from toppings.lab.batches.steps import BatchProfile
from toppings.lab.reproduce import published
from toppings.lab.reproduce.output import NOT_PUBLISHED, Claim, Reproduction, write


def write_models(profile: BatchProfile, out: Path) -> None:
    """The model itself is kept beside it, for `--perf-model`."""
    outcome = Reproduction(
        name="models",
        published="Fig. 11",
        claims=_claims(profile),
        differs=[
            f"step times: {profile.model.origin}; published: Llama-2-7B on an A100",
            f"{len(profile.decode)} decode and {len(profile.prefill)} prefill batches, some held out of the "
            "fit; published: 7,618 requests",
            "`extended` has more features than the published forms",
        ],
        data=profile.to_json(),
    )
    write(out, outcome, draw_batch_profile(profile))
    (out / "perf-model.json").write_text(profile.model.to_json())


def _claims(profile: BatchProfile) -> list[Claim]:
    claims = []
    forms = {"decode": profile.model.decode_forms, "prefill": profile.model.prefill_forms}
    for kind, models in forms.items():
        for form, model in models.items():
            if model.fit is not None:
                is_published = kind == "decode" and form in ("bgmv", "mbgmv")
                there = f"{published.MODEL_R2:g} (on the fitted steps)" if is_published else NOT_PUBLISHED
                text = f"{model.fit.r2:.3f}, error {model.fit.mean_relative_error:.1%} (held out)"
                claims.append(Claim(f"R² of {kind}, {form}", there, text))
    return claims
