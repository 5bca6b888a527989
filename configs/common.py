"""Every setting, with the defaults of the paper (ImageNet-256 latents, SiT's recipe).

An experiment file imports this and changes only what it must. Override from the command line
with --config.a.b=value; unknown names are refused.

What the study (docs/study.md: a small model on digits, three seeds, 600 steps) says of choices that
are open here. It is small, and was trained briefly; the defaults stay the paper's.
* Boundary of the first stage: 0.5 beat 0.25 (FID 7.2 against 10.0); 0.75 beat 0.5 (4.6) at 71% of
  its FLOPs.
* Guidance: with few steps an unguided first stage is worse (10.4 against 7.2 with 2 levels, 11.1
  against 7.6 with 3); trained for SiT's FLOPs, which is 1.6 and 1.9 times the steps, it is better
  (3.6 against 7.0, 2.7 against 6.6). Try both on your own model.
* Level embedding: undecided (7.2 with, 7.8 without). Stages of their own times beat all times at
  every patch size (`flow.stage_times`; 7.2 against 10.0).
* Fine-tuning an expanded SiT for 10% of its steps was far too short when that is 60 steps (FID 32
  and 47 against SiT's 12): count steps, not shares.
"""

from ml_collections import ConfigDict

from ppflow_jax.models.config import SIZES


def get_config(size: str, pyramid: str) -> ConfigDict:
    """Model of SiT's `size` (S, B, L, XL) with stages `pyramid`, e.g. "4x4@0.5,2x2@1"."""
    c = ConfigDict()
    c.seed = 0
    c.init_from = ""  # checkpoint to take weights from; resuming a workdir needs no setting
    c.resume_changed = False  # continue with settings that change what is trained

    c.model = ConfigDict()
    c.model.pyramid = pyramid  # patch width x height @ end time, coarse to fine; t = 0 is noise
    c.model.latent_size = 32
    c.model.channels = 4
    c.model.num_classes = 1000
    c.model.update(SIZES[size])
    c.model.mlp_ratio = 4.0
    c.model.learn_sigma = True  # variance channels of DiT, unused; the public weights have them
    c.model.level_embedding = True  # of several stages
    c.model.ffn = "mlp"  # or moe:..., dense2moe:...: see docs/moe.md, docs/dense2moe.md
    # or clear:radius=8, linfusion, dico: see docs/mixers.md
    c.model.mixer = "attention"
    # or switch:..., dydit, mob:...: see docs/switch.md, docs/dydit.md, docs/dense2moe.md
    c.model.wrap = "none"
    c.model.norm = "none"  # adaLN-Zero, or tdln: see docs/dimr.md
    # or ddt:width=2048,depth=2,heads=16, a wide head (docs/rae.md), or dico:depths=5/4/4/4/4, a U
    # of convolutions (docs/dico.md)
    c.model.network = "none"
    # beside that of data.task, e.g. ("channels:name=low,channels=4",): see docs/conditions.md
    c.model.conditions = ()
    c.model.adapters = "none"  # or lora:rank=8,on=blocks/.*;scale:on=...: see docs/adapters.md
    c.model.students = "none"  # in the place of blocks, e.g. 0:2-4,1:ffn5: see docs/ppcl.md
    c.model.dtype = "bfloat16"  # of matrix products; parameters, norms and the last one float32
    c.model.attention = "auto"  # or xla, deferred, cudnn, splash: see models/attention.py
    c.model.remat = "none"  # none, dots (keep matrix products) or full (keep nothing)

    c.flow = ConfigDict()
    c.flow.path = "linear"  # linear, gvp, vp
    c.flow.prediction = "velocity"  # velocity, score, noise
    # of times towards noise, for large latents; 0: sqrt(numbers / 4096); see docs/rae.md
    c.flow.shift = 1.0
    c.flow.times = "uniform"  # in training, before the shift, or logit_normal:mean=0,std=1
    # or meanflow, guided, halved, distil, mmd, dydit, dense2moe:...: see docs
    c.flow.objective = "flow"
    c.flow.weighting = "none"  # none, velocity, likelihood; for score and noise
    c.flow.label_drop = 0.1
    c.flow.balance = 0.01  # weight of the balance term of a mixture of experts
    c.flow.prior = 1.0  # weight of the prior of experts by time
    c.flow.complete = 1.0  # weight of the loss of the complete model beside the dynamic one
    c.flow.terms = ()  # of the loss, e.g. ("repa:layer=4,dims=768",); their weights: train.phases
    c.flow.stage_share = ()  # samples of each stage, e.g. (2, 1, 1); empty: by duration
    c.flow.stage_times = ()  # times each stage is trained on, e.g. ((0, 1), (0, 1)); empty: its own

    c.data = ConfigDict()
    # cache: made by ppflow_jax.prepare; folder: one directory per class; tfds: a prepared TFDS
    # dataset; parquet: its shards, or what datasets.save_to_disk made; arrays: latents.npy and
    # labels.npy; digits
    c.data.source = "arrays"
    c.data.path = ""  # folder; of tfds also a name such as imagenet2012, of parquet hf:OWNER/REPO
    c.data.space = "latents"  # latents or pixels
    c.data.vae = ""  # vae:DIR or taesd:DIR, encodes pictures in every step; must be a cache's own
    c.data.flip = True  # mirror pictures (cache: of --flips=both) with probability 1/2 every visit
    c.data.stage = ""  # folder for copies of what is in gs:// or s3://; empty: see docs/stores.md
    c.data.unreadable = "error"  # or skip: the next picture stands in, and the name is printed
    c.data.workers = 0  # reading processes; 0: threads, enough for caches, arrays and digits
    c.data.split = "train"  # of tfds and parquet, and so are the two below
    c.data.image_feature = "image"
    c.data.label_feature = "label"
    c.data.fields = ()  # arrays of the examples that terms read, e.g. ("teacher",): docs/data.md
    c.data.batch_size = 256
    # super_resolution:factor=2, inpainting, colourisation or edges: see docs/conditions.md
    c.data.task = "none"

    c.optim = ConfigDict()
    c.optim.name = "adamw"  # adamw, muon (for the matrices of the blocks, with AdamW for the rest)
    c.optim.lr = 1e-4
    c.optim.schedule = "constant"  # constant, cosine, wsd, wsd_sqrt: see docs/recipes.md
    c.optim.decay_share = 0.2  # of the steps, at the end: in which wsd decays
    c.optim.warmup_steps = 0
    c.optim.b1 = 0.9
    c.optim.b2 = 0.999
    c.optim.eps = 1e-8
    c.optim.weight_decay = 0.0
    c.optim.clip = 0.0  # global gradient norm; 0: no clipping

    c.train = ConfigDict()
    c.train.steps = 400_000
    c.train.teacher = ""  # checkpoint that a student is distilled from: see guided_distillation.md
    c.train.ema = 0.9999
    c.train.ema_warmup = True  # decay min(ema, (1 + step) / (10 + step)), for short runs
    # Averages beside that EMA, e.g. (0.05, 0.10), kept every save_every steps: docs/recipes.md
    c.train.posthoc_ema = ()
    # Patterns of the leaves that are trained; the others stay as init_from has them, and are not
    # saved again: see docs/adapters.md
    c.train.trainable = (".*",)
    c.train.phases = ()  # weights of terms over time: ((until_step, {"repa": 0.5}), (until, {}))
    c.train.skip_nonfinite = 0  # steps in a row that are left out if loss or gradient is not finite
    c.train.accumulate = 1  # microbatches of one step
    c.train.log_every = 100
    c.train.trackers = ()  # of "wandb", "mlflow", "trackio", beside the files: docs/recipes.md
    c.train.save_every = 10_000
    c.train.keep = 3

    c.sample = ConfigDict()
    c.sample.every = 10_000  # steps between EMA sample grids; 0: only at the end
    c.sample.count = 20
    c.sample.solver = "heun"
    c.sample.steps = 50
    c.sample.cfg = (4.0,)  # one scale, or one for every stage
    c.sample.decode = "none"  # vae:DIR or taesd:DIR: pictures of latents instead of false colours

    c.eval = ConfigDict()
    c.eval.every = 0  # steps between metrics of EMA samples; 0: none
    c.eval.count = 1000
    c.eval.metrics = ("fid", "kid")  # of fid, sfid, is, precision, recall, kid
    c.eval.features = ""  # folder of a feature network; empty: one trained on the data
    c.eval.resize = "tf1"  # of an Inception: tf1 or torch
    c.eval.reference = ""  # as --reference of evaluate; empty: the training data
    c.eval.decode = "none"  # vae:DIR or taesd:DIR for latents

    c.mesh = ConfigDict()
    c.mesh.data = -1  # -1: all remaining devices
    c.mesh.fsdp = 1
    c.mesh.tensor = 1
    # Of a mixture: devices that hold different experts, to which tokens go. See docs/moe.md
    c.mesh.expert = 1
    c.mesh.capacity = 2.0  # with expert > 1: tokens that an expert takes, over the mean
    # What fsdp splits: 3, all, and weights are gathered block by block, twice a step; 2, all but
    # the weights during a step, gathered once: less is sent, more is held. See docs/pods.md
    c.mesh.zero = 3
    c.mesh.auto = False  # True: data, fsdp and zero are chosen by what a device holds
    return c
