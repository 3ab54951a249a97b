"""A fitted performance model as a table for the terminal."""

from rich import box
from rich.table import Table

from toppings.cluster.perf_model import LinearModel, PerfModel
from toppings.lab.tables import LAYOUT, UNKNOWN


def perf_model_table(model: PerfModel) -> Table:
    """How each form does on the steps that were held out of its fit, and what it says that features cost."""
    table = Table(box=box.SIMPLE_HEAD, title=f"Step costs, {model.origin}", **LAYOUT)
    for heading in ("step", "form"):
        table.add_column(heading, no_wrap=True)
    for heading in ("R²", "error"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("ms")
    for kind, forms, used in (
        ("decode", model.decode_forms, model.decode_form),
        ("prefill", model.prefill_forms, model.prefill_form),
    ):
        for name, form in forms.items():
            mark = " *" if name == used else ""
            table.add_row(kind, name + mark, *_standing(form), _terms(form))
        table.add_section()
    fits = [forms[next(iter(forms))].fit for forms in (model.decode_forms, model.prefill_forms)]
    counts = [f"{fit.num_held_out} of {fit.num_fitted + fit.num_held_out}" for fit in fits if fit]
    table.caption = f"on held-out batches ({' decodes, '.join(counts)} prefills); *: the form that is used"
    return table


def _standing(form: LinearModel) -> tuple[str, str]:
    if form.fit is None:
        return UNKNOWN, UNKNOWN
    return f"{form.fit.r2:.3f}", f"{form.fit.mean_relative_error:.1%}"


def _terms(form: LinearModel) -> str:
    terms = [
        _digits(ms) if name == "steps" else f"{_digits(ms * 1e3)}us·{name}"
        for name, ms in form.coefficients.items()
        if ms
    ]
    return " + ".join(terms)


def _digits(value: float) -> str:
    """Three that count, without an exponent."""
    return f"{float(f'{value:.3g}'):g}"
