"""Adaptation at inference, cell by cell (open in an editor that knows ``# %%``).

python examples/adapt_notebook.py
"""

# %% A policy: the built-in model with an adapter at the base model.
# A trained run is `run = gj.load_run("runs/TRAINED")` instead of the next four lines.
import grpocem_jax as gj

settings = gj.load_config("tiny")
config = gj.parse_config(settings)
policy = gj.load_policy(config)
run = gj.TrainedRun(config, policy, policy.zero)

# %% Text that is foreign to the model, as a few examples of its kind; others only judge.
foreign = [
    "Mix flour and water, let it rest, then bake it hot.",
    "Chop the onion and fry it slowly in a little oil.",
    "Boil the beans, drain the beans, and keep the water.",
    "Grate the cheese and stir it into the warm sauce.",
    "Peel the apples, core the apples, and slice them thin.",
    "Whip the cream with sugar and spread it on the cake.",
]
support, judges = foreign[:4], [gj.Text(text) for text in foreign[4:]]


def judged(offsets) -> float:
    """Mean log-likelihood per token of the texts that were not adapted to, in nats."""
    return float(gj.log_likelihoods(run, offsets, judges).mean())


# %% CEM, behind a gate that keeps the base model unless held-back examples gain.
cem = gj.adapt(run, support)
print(f"CEM       {cem.returned:<6} {judged(run.offsets):.3f} -> {judged(cem.offsets):.3f}")

# %% The same with a gradient, which a likelihood has.
settings.cem.method = "gradient"
gradient = gj.adapt(run, support, settings=gj.parse_config(settings).cem)
print(
    f"gradient  {gradient.returned:<6} {judged(run.offsets):.3f} -> {judged(gradient.offsets):.3f}"
)

# %% What the adapted policy writes.
prompt = "Review: The soup was cold, but the waiter was kind.\nSentiment:"
for name, offsets in (("before", run.offsets), ("after", gradient.offsets)):
    print(f"{name:<9} {gj.complete(run, offsets, [prompt])[0]!r}")
