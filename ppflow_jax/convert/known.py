"""The names by which a model is recognised inside a file, whatever they are prefixed with."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Known:
    """A family of models.

    Attributes:
      family: sit (and PPFlow, DiCo), vae, taesd or inception.
      names: matches what its names look like, from where the model begins.
      needed: patterns, each of which some name of a complete model begins with.
      root: what its names begin with, where that is removed like a wrapper.
    """

    family: str
    names: re.Pattern
    needed: tuple[re.Pattern, ...]
    root: str = ""


def _known(family: str, names: str, *needed: str, root: str = "") -> Known:
    return Known(family, re.compile(names), tuple(map(re.compile, needed)), root)


KNOWN = (
    _known(
        "sit",
        r"([xyts]_embedder|s_projector|(enc|dec)_feat_rope|level_embedder|final_layer|conditions"
        r"|(blocks|routers)\.\d+)\..+"
        r"|pos_embed(\.\d+)?"
        # DiCo
        r"|(t_embedder_\d|((en|de)coder_level_\d|latent)\.\d+|(down|up)\d_\d\.body)\..+"
        r"|reduce_chan_level\d\.(weight|bias)",
        r"x_embedder\.proj\.weight$",
        r"final_layer\.(linear|out_proj)\.weight$",
        r"(blocks|encoder_level_1)\.0\.",
    ),
    _known(
        "vae",
        r"(post_)?quant_conv\..+|(en|de)coder\.(conv_in|(conv_)?norm_out|conv_out"
        r"|(mid|up|down)(_blocks?)?)\..+",
        r"(en|de)coder\.conv_in\.weight$",
        r"(en|de)coder\.(mid|up|down)",
    ),
    _known(
        "taesd",
        r"((en|de)coder\.)?(layers\.)?\d+\.(conv\.\d\.)?(weight|bias)",
        r"((en|de)coder\.)?(layers\.)?\d+\.conv\.\d\.weight$",
    ),
    _known(
        "inception",
        r"(Conv2d_\w+|Mixed_\d\w|AuxLogits)\..+|fc\.(weight|bias)",
        r"Conv2d_1a_3x3\.",
        r"Mixed_5b\.",
    ),
    _known(
        "inception",
        r"layers\.(conv|mixed)\w*\..+",
        r"layers\.conv\.",
        r"layers\.mixed\.",
        root="net.",
    ),
)

# What wraps a module, or every layer of it, and says nothing about which model it is.
WRAPPERS = frozenset(
    "module _orig_mod _checkpoint_wrapped_module _fsdp_wrapped_module _fpw_module "
    "_forward_module".split()
)
# Attributes that a model is kept under. Before a model they tell one model from another; between
# its names they are wrappers too.
OWNERS = frozenset(("model", "net", "ema_model", "first_stage_model", "vae"))
# Entries of training checkpoints that hold tensors under a model's names, but no weights.
NO_WEIGHTS = frozenset(
    "opt optim optimizer optimizers optimizer_states optimizer_state_dict optim_state_dict "
    "scheduler lr_scheduler lr_schedulers scaler args grad grads gradients exp_avg exp_avg_sq "
    "momentum_buffer".split()
)
# Counters and settings that trainers and averaging modules save beside the weights.
BOOKKEEPING = frozenset(
    "n_averaged num_updates decay ema_decay initted step steps global_step epoch iteration "
    "train_steps".split()
)
# Parts of other papers' SiT that only training needs: REPA's and SRA's projections.
ADD_ONS = frozenset(("projectors", "projector", "ap_head"))
_EMA = re.compile(r"(.*_)?ema\d*(_.*)?|averaged_model|swa_model")
_LIVE = frozenset(("online_model", "online", "student"))


def is_ema(parts: tuple[str, ...]) -> bool:
    """Whether a path inside a file leads to averaged weights; the innermost name decides."""
    for part in reversed(parts):
        if _EMA.fullmatch(part):
            return True
        if part in _LIVE:
            return False
    return False
