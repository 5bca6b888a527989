"""Pictures over HTTP, and a page to play with: python -m ppflow_jax.serve --checkpoint=DIR

    curl --json '{"label": 3, "seed": 1, "guidance": [1, 3]}' localhost:8000/v1/images -o 3.png

The same bits as `sample` gives for the same seed, label and --microbatch. Requests of several
clients are made together. There is no authentication: see docs/serve.md before it is reachable
from elsewhere.
"""

from __future__ import annotations

import ipaddress

from absl import flags

from ppflow_jax import cli
from ppflow_jax.errors import InputError

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Workdir (its latest step) or one step.")
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on.")
_PORT = flags.DEFINE_integer("port", 8000, "Port; 0: any that is free.")
_DECODE = flags.DEFINE_string(
    "decode", "none", "vae:DIR or taesd:DIR, a converted autoencoder; none: false colours."
)
_WEIGHTS = flags.DEFINE_enum("weights", "ema", ["ema", "params"], "Which parameters.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of matrix products.")
_PLAN = flags.DEFINE_string(
    "plan", None, "File of `ppflow tune`, for requests with the preset `tuned`."
)
_MICROBATCH = flags.DEFINE_integer(
    "microbatch", 16, "Images a device computes at once; changes last bits."
)
_MAX_QUEUE = flags.DEFINE_integer(
    "max_queue", 256, "Images that may wait; who asks for more is told to come back (429)."
)


def main() -> None:
    try:
        from ppflow_jax.serve.server import Server, bind
    except ModuleNotFoundError as e:
        if (e.name or "").partition(".")[0] not in ("starlette", "uvicorn", "h11"):
            raise
        raise InputError(f"{e.name} is not installed: pip install 'ppflow_jax[serve]'") from e
    from ppflow_jax.api.inputs import whole
    from ppflow_jax.api.load import load
    from ppflow_jax.console import say
    from ppflow_jax.devices.host_memory import keep_scratch
    from ppflow_jax.serve.ask import tuned_for
    from ppflow_jax.serve.batcher import Batcher
    from ppflow_jax.serve.device import Device

    most = whole("--max_queue", _MAX_QUEUE.value)
    with bind(_HOST.value, _PORT.value) as bound:
        host, port = bound.getsockname()[:2]
        keep_scratch()
        model = load(_CHECKPOINT.value, weights=_WEIGHTS.value, dtype=_DTYPE.value)
        batcher = Batcher(Device(model, _DECODE.value, _MICROBATCH.value), most)
        server = Server(batcher, tuned_for(model, _PLAN.value) if _PLAN.value else None)
        if not ipaddress.ip_address(host).is_loopback:
            say(f"{host} can be reached from other machines, and nothing here asks who they are")
        where = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        server.serve_on(bound, lambda: say(f"serving {_CHECKPOINT.value} at {where}"))
    say("stopped; everything that was asked for is answered")


if __name__ == "__main__":
    cli.run(main, required=("checkpoint",))
