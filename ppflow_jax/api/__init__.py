"""The library for notebooks and programs: `import ppflow_jax as pf`.

    model = pf.load("runs/b2")            # a run, a converted folder, a .pt or .safetensors file
    plan = model.plan(steps=50, cfg=(1, 3), accelerate="balanced")
    print(plan.explain(batch=16))
    samples = model.sample(16, plan=plan, seed=0, labels="balanced", decode="vae:weights/vae")
    samples.pictures                      # uint8 [16, h, w, 3]

A label, seed, noise or guidance scale is a number at run time: another one compiles nothing, as
long as the same stages are guided and the number of images stays. Every function checks what it is
given and raises `InputError`, one line that says what to do.
"""

from ppflow_jax.api.inputs import Samples
from ppflow_jax.api.load import evaluate, load
from ppflow_jax.api.model import Model
from ppflow_jax.convert.reading import Reading
from ppflow_jax.errors import InputError, RunError
from ppflow_jax.generate.plan import Plan
from ppflow_jax.train.experiment import Experiment

__all__ = [
    "Experiment",
    "InputError",
    "Model",
    "Plan",
    "Reading",
    "RunError",
    "Samples",
    "evaluate",
    "load",
]
