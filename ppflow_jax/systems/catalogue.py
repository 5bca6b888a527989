"""What is in this folder and where it comes from: the rows of docs/systems.md.

python -m ppflow_jax.systems > docs/systems.md
"""

from __future__ import annotations

from dataclasses import dataclass

from ppflow_jax.systems.composition import table

PAPER = "https://arxiv.org/abs/"


@dataclass(frozen=True)
class System:
    """A method of a paper.

    Attributes:
      name: as its paper has it.
      papers: arXiv numbers.
      original: repository and commit that was looked at or run, and its licence.
      file: in ppflow_jax/.
      use: a setting or a command that switches it on.
      page: of the documentation.
      exact: what is as in the paper or the original, and how that is known.
      differs: what is not, and why.
      test: that pins it.
      effect: what it gained or lost here, and the command that shows it.
    """

    name: str
    papers: tuple[str, ...]
    original: str
    file: str
    use: str
    page: str
    exact: str
    differs: str
    test: str
    effect: str


SYSTEMS = (
    System(
        "TaylorSeer",
        ("2503.06923",),
        "Shenyi-Z/TaylorSeer, GPL-3",
        "systems/forecast.py",
        "--accelerate=forecast.interval=3,forecast.order=1",
        "accelerate.md",
        "schedules, differences and forecasts, against arrays of the original",
        "the schedule is static and starts again in every stage; Heun's two evaluations have "
        "memories of their own",
        "tests/systems/test_forecast.py",
        "digits: a lower error than fewer Euler steps at equal time, a higher one than AB2 "
        "(`python -m benchmarks.fast_sampling`)",
    ),
    System(
        "HiCache",
        ("2508.16984",),
        "none looked at",
        "systems/forecast.py",
        "--accelerate=forecast=hermite,forecast.interval=3",
        "accelerate.md",
        "scaled Hermite polynomials in place of powers, from the paper's formulas",
        "as of TaylorSeer",
        "tests/systems/test_forecast.py",
        "digits: error 0.0501 with 9 full of 24 steps of a SiT, TaylorSeer's 0.0313 "
        "(`python -m benchmarks.fast_sampling`)",
    ),
    System(
        "FORA",
        ("2407.01425",),
        "prathebaselva/FORA acde628, no licence file",
        "systems/forecast.py",
        "--accelerate=forecast.order=0,forecast.schedule=fora,forecast.interval=2",
        "accelerate.md",
        "the schedule and reuse of the original",
        "as of TaylorSeer",
        "tests/systems/test_schedule.py",
        "digits: worse than fewer Euler steps at equal time (`python -m benchmarks.fast_sampling`)",
    ),
    System(
        "DeepCache and Delta-DiT",
        ("2312.00858", "2406.01125"),
        "horseee/DeepCache 1691a3a (its schedule); no code of Delta-DiT",
        "systems/forecast_blocks.py",
        "--accelerate=forecast.place=blocks,forecast.blocks=2-4,forecast.interval=2,"
        "forecast.order=0",
        "accelerate.md",
        "the dense schedule, index by index",
        "a range of blocks of a transformer stands for the levels of a U-Net",
        "tests/systems/test_schedule.py",
        "digits: worse than fewer Euler steps at equal time (`python -m benchmarks.fast_sampling`)",
    ),
    System(
        "TeaCache and MagCache",
        ("2411.19108", "2506.09045"),
        "ali-vilab/TeaCache 7c10efc, Zehong-Ma/MagCache df81cb1, both Apache-2",
        "systems/forecast_calibrated.py",
        "ppflow tune --forecast=branch --schedule=magcache",
        "tune.md",
        "which steps are full, against arrays of the originals",
        "thresholds are found for a number of full steps instead of being given",
        "tests/systems/test_calibrated.py",
        "digits, 20 steps of which 8 full: error 0.0197 and 0.0228, by dynamic programming 0.0195; "
        "eight fitted steps have 0.0123 and cost less ([Tune](tune.md))",
    ),
    System(
        "HarmoniCa",
        ("2410.01723",),
        "ModelTC/HarmoniCa 5d7f78d, Apache-2",
        "systems/harmonica.py",
        "ppflow tune --forecast=harmonica --steps=20 --share=0.4",
        "harmonica.md",
        "mixed and routed branches, the router's loss, gradients, updates and weights of steps, "
        "masks and trajectories, against arrays of the original",
        "velocities, and memories that begin anew in every stage; the price of a branch is found "
        "from a budget; masks are few and static; every rollout begins with nothing kept, in "
        "the original not those after its weights are measured",
        "tests/systems/test_harmonica.py",
        "digits, 2 levels, 3 seeds, ten steps at half their cost: error 0.135, a tuned plan of as "
        "much time 0.035 ([Learned caching](harmonica.md#what-it-gained-here))",
    ),
    System(
        "SDTM",
        ("2505.11707",),
        "ICTMCG/SDTM dfaf461, no licence file",
        "systems/sdtm.py",
        "--accelerate=merge=sdtm",
        "accelerate.md",
        "grouping, merging and ratios, against arrays of the original",
        "no prompt reweighting (a class condition has no text tokens); token counts are static and "
        "at most three a stage",
        "tests/systems/test_merge.py",
        "digits: does not pay on 16 tokens (`python -m benchmarks.fast_sampling`)",
    ),
    System(
        "ToMe",
        ("2303.17604",),
        "none looked at",
        "systems/tome.py",
        "--accelerate=merge=tome",
        "accelerate.md",
        "bipartite soft matching from the paper",
        "as of SDTM",
        "tests/systems/test_match.py",
        "digits: does not pay on 16 tokens (`python -m benchmarks.fast_sampling`)",
    ),
    System(
        "RAS",
        ("2502.10389",),
        "microsoft/RAS a9c5ec8, MIT",
        "systems/ras.py",
        "--accelerate=ras=std",
        "accelerate.md",
        "what decides, what is left out and the steps that follow, against arrays of the original; "
        "keys and values against a masked network",
        "tokens left out often come back at both ends (in the original they stay out where the "
        "largest values are); exact counts; every image of a batch has its own choice",
        "tests/systems/test_ras.py",
        "digits, 2 levels, 3 seeds: error 0.057 to 0.078 of 24 steps at 73 to 91% of their time, "
        "fewer Euler steps 0.029 at 67%, a tuned plan of 8 0.011 at 36%: does not pay on 16 tokens "
        "([accelerate.md](accelerate.md))",
    ),
    System(
        "Re-ttention",
        ("2505.22918",),
        "cccrrrccc/Re-ttention bbec1f5, MIT",
        "systems/rettention.py",
        "--accelerate=rettention=0.25",
        "accelerate.md",
        "sparse attention, its ratio and what is kept, against arrays of the original",
        "the ratio ends at 1; scores outside the band are not computed; what is kept is added "
        "before the output projection, which is linear",
        "tests/systems/test_rettention.py",
        "digits, 2 levels, 3 seeds: error 0.054 and 0.077 at no fewer FLOPs, a tuned plan of 8 "
        "0.011 at 38%: does not pay on 16 tokens ([accelerate.md](accelerate.md))",
    ),
    System(
        "DiT-MoE",
        ("2407.11633",),
        "feizc/DiT-MoE bd34bbb, no licence file",
        "systems/moe.py",
        "--config.model.ffn=moe:experts=8",
        "moe.md",
        "routing, experts, balance term and their gradients, against arrays of the original",
        "the balance is a term of the loss and not only of its gradient, the same updates; "
        "upcycling is exact with `renormalise=true`",
        "tests/systems/test_moe.py",
        "digits, upcycled, 3 seeds: FID 5.4 at dense's active FLOPs (dense 5.6, undecided); 3.2 "
        "against 3.0 with an unguided coarse stage; imagenette latents: 3.12, dense 3.19 "
        "([moe.md](moe.md#what-it-gained-here))",
    ),
    System(
        "Dense2MoE",
        ("2510.09094",),
        "no code found",
        "systems/dense2moe.py",
        "--config.model.ffn=dense2moe:experts=12",
        "dense2moe.md",
        "the cut: the dense model with all experts, its shared slice with none, any order of units "
        "and experts, and importance, by identities",
        "the gate's mean is 1; importance is averaged over batches",
        "tests/systems/test_dense2moe.py",
        "digits, 2 levels, 3 seeds: FID 5.4 at 62% of the dense model's FLOPs, the dense one 5.6 "
        "after as many steps (undecided) ([dense2moe.md](dense2moe.md#what-it-gained-here))",
    ),
    System(
        "Distillation of Dense2MoE",
        ("2510.09094",),
        "the losses as the paper is summarised; no code found",
        "systems/dense2moe_distillation.py",
        "--config=digits_dense2moe",
        "dense2moe.md",
        "both terms, the balance and their phases, against what they are made of",
        "training data instead of pictures that the teacher made; all weights are trained",
        "tests/systems/test_dense2moe_distillation.py",
        "digits, 2 levels, 3 seeds: FID 6.1 at 62% of the teacher's FLOPs, the teacher 6.1; by "
        "tuned plans 6.1 and 6.1 ([dense2moe.md](dense2moe.md#what-it-gained-here))",
    ),
    System(
        "Mixture of blocks",
        ("2510.09094",),
        "no code found",
        "systems/mixture_of_blocks.py",
        "--config=digits_dense2moe:mob",
        "dense2moe.md",
        "as many of every group as asked; what is left out is as if it were not there",
        "the router looks at the time alone; gates are 0 or 1 with the gradient of a softmax",
        "tests/systems/test_mixture_of_blocks.py",
        "digits, 2 levels, 3 seeds: 2 of 3 blocks, FID 6.3 at 42% of the FLOPs of the teacher, "
        "which has 6.1: a loss; by tuned plans, which evaluate all blocks, 6.3 and 6.1 "
        "([dense2moe.md](dense2moe.md#what-it-gained-here))",
    ),
    System(
        "Numbers of experts by stage",
        ("2510.09094",),
        "no code found",
        "systems/fewer_experts.py",
        "--accelerate=experts=0/2",
        "dense2moe.md",
        "samples and FLOPs of a stage are those of a model with so many experts",
        "a number for every stage, not one for the model",
        "tests/systems/test_dense2moe.py",
        "digits, 2 levels, 3 seeds: two experts, none in the coarse stage, none at all have FID "
        "6.1, 6.0, 6.0 at 39%, 38%, 34% of SiT's FLOPs "
        "([dense2moe.md](dense2moe.md#what-it-gained-here))",
    ),
    System(
        "REPA",
        ("2410.06940",),
        "sihyun-yu/REPA 67f7145, MIT",
        "systems/repa.py",
        "--config=digits_repa",
        "repa.md",
        "projector, loss, gradients, guided ODE and SDE samples, against arrays of the original",
        "coarse stages see the teacher's features averaged over their cells; features are a field "
        "of the data instead of a network in every step",
        "tests/systems/test_repa.py",
        "digits, 3 seeds: FID 5.7 with, 6.1 without, undecided; 4.2 and 8.1 with an unguided "
        "coarse stage; imagenette latents: worse, 4.4 and 3.6 "
        "([repa.md](repa.md#what-it-gained-here))",
    ),
    System(
        "HASTE",
        ("2505.16792",),
        "NUS-HPC-AI-Lab/HASTE eb7b1f1, no licence file",
        "systems/haste.py",
        "--config=haste",
        "repa.md",
        "both terms, their gradients and the step of the stop, against arrays of the original",
        "a softmax is over the keys of one query for any number of tokens; its log stays finite; "
        "after the stop nothing of teacher and projector is computed",
        "tests/systems/test_phases.py",
        "digits, 3 seeds: REPA ended half way does as REPA to the end; the attention term was not "
        "trained ([repa.md](repa.md#what-it-gained-here))",
    ),
    System(
        "DDAE",
        ("2303.09769", "2307.08702"),
        "FutureXiang/ddae ddd4a3b, no licence file",
        "evaluate/probing.py",
        "ppflow probe --checkpoint=runs/digits",
        "probe.md",
        "features of every block and the linear classifier, against arrays of the original",
        "an example's noise is fixed, also in testing; the stage is that of the time; ridge "
        "regression beside the classifier",
        "tests/test_probe.py",
        "digits, 200 steps: 87% at t=0.9, 55 to 61% at 0.6, 24% in the coarse stage at 0.3 "
        "([probe.md](probe.md))",
    ),
    System(
        "Switch-DiT",
        ("2403.09176",),
        "byeongjun-park/Switch-DiT 12fa9a5, MIT",
        "systems/switch.py",
        "--config.model.wrap=switch:experts=3",
        "switch.md",
        "gates, experts, prior and their gradients, against arrays of the original",
        "experts fold into one matrix of a block and image; the second routing, by fixed masks "
        "(DTR), is not here",
        "tests/systems/test_switch.py",
        "digits, 2 levels, 3 seeds: FID 6.2 with 10% more FLOPs, 6.1 without, undecided "
        "([switch.md](switch.md))",
    ),
    System(
        "DyDiT",
        ("2410.03456", "2504.06803"),
        "alibaba-damo-academy/DyDiT 0ddc509, no licence file",
        "systems/dydit.py",
        "--accelerate=width=1",
        "dydit.md",
        "routers, masks, outputs and gradients through the decisions, against arrays of the "
        "original; slices of the weights against masks",
        "routers end in zeros at first, so that the start is exact; slices are static, of steps or "
        "stages; capacity for tokens is fixed; TD-LoRA is not here (no code found)",
        "tests/systems/test_dydit.py",
        "digits, 2 levels, 3 seeds: the same samples at 70 to 74% of plain blocks' FLOPs with four "
        "widths, at 91 to 99% with one ([dydit.md](dydit.md#what-it-gained-here))",
    ),
    System(
        "Training of DyDiT",
        ("2410.03456",),
        "alibaba-damo-academy/DyDiT 0ddc509, no licence file",
        "systems/dydit_training.py",
        "--config=digits_dydit",
        "dydit.md",
        "the loss of FLOPs, its gradient, its constants and the schedule of its target, against "
        "arrays of the original; the loss of the complete model",
        "stages count by their duration and cost; gradients are clipped before the one update of a "
        "step; no term for few tokens, whose weight is 0 in the release; heads and units are not "
        "sorted by importance first, as in the release",
        "tests/systems/test_dydit.py",
        "digits, 2 levels, 3 seeds: FID 5.6, plain blocks trained as long 6.9, or 6.5 by a tuned "
        "plan, which slices cannot have; 2.5 and 2.3 with an unguided coarse stage, undecided "
        "([dydit.md](dydit.md#what-it-gained-here))",
    ),
    System(
        "TD-LN (DiMR)",
        ("2406.09416",),
        "qihao067/DiMR fa141ae, Apache-2",
        "systems/dimr.py",
        "--config.model.norm=tdln",
        "dimr.md",
        "both forms of the norm and their gradients, alone and inside the whole network, against "
        "arrays of the original",
        "the label is added at the input instead of being a token, tau = 1 - 2t is the flow's, the "
        "final layer keeps adaLN; the U-shaped network is not here",
        "tests/systems/test_dimr.py",
        "digits, 2 levels, 3 seeds: worse, FID 9.3, with adaLN-Zero 6.1; by tuned plans 8.8 and "
        "6.1 ([dimr.md](dimr.md#what-it-gained-here))",
    ),
    System(
        "Multi-resolution loss (DiMR)",
        ("2406.09416",),
        "qihao067/DiMR fa141ae, Apache-2",
        "systems/dimr.py",
        "config.flow.terms with multires:factors=2",
        "dimr.md",
        "averages of targets, coefficients, loss and gradients, against arrays of the original",
        "one prediction is averaged, where DiMR has a branch for every resolution; odd sizes are "
        "refused",
        "tests/systems/test_dimr.py",
        "digits, 2 levels, 3 seeds: FID 5.1, without 6.1; by tuned plans 5.1 and 6.1 "
        "([dimr.md](dimr.md#what-it-gained-here))",
    ),
    System(
        "Self-conditioning (DDAE++)",
        ("2505.10999",),
        "none public",
        "systems/self_conditioning.py",
        "config.model.conditions with selfcond:name=middle",
        "self_conditioning.md",
        "a restatement of the formula, a start that is equal bit for bit, and that earlier blocks "
        "never change",
        "from a summary of the paper, as no code is public; its contrastive self-distillation is "
        "not here",
        "tests/systems/test_self_conditioning.py",
        "digits, 2 levels, 3 seeds: FID 5.8, without 6.1, by tuned plans 5.6 and 6.1, undecided; "
        "3.6 and 8.1 with an unguided coarse stage "
        "([self_conditioning.md](self_conditioning.md#what-it-gained-here))",
    ),
    System(
        "CLEAR",
        ("2412.16112",),
        "Huage001/CLEAR 98e9fed, Apache-2",
        "systems/clear.py",
        "--config.model.mixer=clear:radius=8",
        "mixers.md",
        "masks, outputs and gradients, with cells too, against arrays of the original",
        "tiles and rectangles of keys instead of FlexAttention; no tokens of a text; no "
        "proportional scale",
        "tests/systems/test_mixers.py",
        "digits, 2 levels, 3 seeds: FID 4.8, its teacher 6.1, by tuned plans the same, undecided; "
        "radius 8, two blocks of width 384 on CPU: 0.38 of full attention's time at 4,096 tokens, "
        "0.87 at 1,024, 1.01 at 256 "
        "([mixers.md](mixers.md#from-where-on-they-pay))",
    ),
    System(
        "LinFusion",
        ("2409.02097",),
        "Huage001/LinFusion 62ef289, Apache-2",
        "systems/linfusion.py",
        "--config.model.mixer=linfusion",
        "mixers.md",
        "outputs and gradients, against arrays of the original",
        "sums over keys are divided by the number of keys, in the original by that of queries; the "
        "MLPs are always there; the bias of DiT's projections stays",
        "tests/systems/test_mixers.py",
        "digits, 2 levels, 3 seeds: FID 4.9, its teacher 6.1, by tuned plans 4.8 and 6.1, "
        "undecided; two blocks of width 384 on CPU: 0.28 of full attention's time at 4,096 tokens, "
        "0.60 at 1,024, 1.18 at 256 "
        "([mixers.md](mixers.md#from-where-on-they-pay))",
    ),
    System(
        "Distillation of mixers",
        ("2412.16112", "2409.02097"),
        "the loss as both papers describe it; no code was run",
        "systems/mixer_distillation.py",
        "--config=digits_mixers:clear",
        "mixers.md",
        "flow, prediction and attention branches with the weights of both papers",
        "training data instead of pictures that the teacher made; AdamW",
        "tests/systems/test_mixers.py",
        "digits, 2 levels, 3 seeds: FID 4.8 (CLEAR) and 4.9 (LinFusion), their teacher 6.1, "
        "undecided; 4.1, 4.2 and 8.1 with an unguided coarse stage "
        "([mixers.md](mixers.md#what-they-gained-here))",
    ),
    System(
        "DiCo",
        ("2505.11196",),
        "shallowdream204/DiCo b596b05, Apache-2",
        "systems/dico.py",
        "--config.model.mixer=dico",
        "mixers.md",
        "a block's convolution, gate and gradients, against arrays of the original",
        "a mixer in a transformer's blocks, with DiT's MLP",
        "tests/systems/test_mixers.py",
        "digits, 2 levels, 3 seeds: worse, FID 7.9 (7.3 by tuned plans of 8 evaluations), with "
        "attention 6.1 (6.1) ([mixers.md](mixers.md#what-they-gained-here))",
    ),
    System(
        "DiCo network",
        ("2505.11196",),
        "shallowdream204/DiCo b596b05, Apache-2",
        "systems/dico_network.py",
        "--config=dico:b",
        "dico.md",
        "parameters of the five sizes; every level, the output, guidance on 3 channels and all "
        "gradients, against arrays of the original; the names of public weights",
        "trained on velocity unless told `ddpm`, never on the variance; stages of coarser patches",
        "tests/systems/test_dico_network.py",
        "digits, 3 seeds, at SiT's FLOPs: FID 4.4, SiT 10.6; 2.8 times its time on CPU; with 2 "
        "levels 5.2, PPFlow's 6.1, undecided, by tuned plans 4.8 and 6.1, better "
        "([dico.md](dico.md#what-it-gained-here))",
    ),
    System(
        "RAE times",
        ("2510.11690", "2403.03206"),
        "bytetriper/RAE a4d18c4, MIT",
        "flow/times.py",
        "--config=digits_rae",
        "rae.md",
        "the shift, logit-normal times and grids, against arrays of the original",
        "both ends of time are drawn and reached; stages weigh what the shifted times give them; "
        "the autoencoder is not here",
        "tests/flow/test_times.py",
        "digits, 2 levels, 3 seeds: FID 6.9 at 83% of the FLOPs of equal times, which have 6.1, by "
        "tuned plans 6.6 and 6.1, undecided ([rae.md](rae.md#what-it-gained-here))",
    ),
    System(
        "RAE wide head",
        ("2510.11690",),
        "bytetriper/RAE a4d18c4, MIT",
        "systems/ddt.py",
        "--config=digits_ddt",
        "rae.md",
        "the network inside and out, loss, gradients, guidance and samples against arrays of the "
        "original; numbers of parameters of all public sizes; names of weights in both directions",
        "stages have projections and a level embedding of their own; a head that is too narrow for "
        "a stage is refused; kernels start as DiT's",
        "tests/systems/test_ddt.py",
        "digits, 2 levels, 3 seeds, at like FLOPs: worse, FID 10.8, plain blocks 6.1; by tuned "
        "plans of 8 evaluations 10.1 and 6.1 ([rae.md](rae.md#what-it-gained-here))",
    ),
    System(
        "2-D rotary positions and SwiGLU",
        ("2104.09864", "2002.05202"),
        "bytetriper/RAE a4d18c4, MIT",
        "systems/ddt_blocks.py",
        "--config.model.mixer=rope",
        "rae.md",
        "tables of turns and branches of blocks against arrays of RAE's code",
        "places count in units of the pyramid's smallest patch",
        "tests/systems/test_ddt.py",
        "digits, 2 levels, 3 seeds: FID 6.3, plain blocks 6.1, by tuned plans of 8 evaluations 6.1 "
        "and 6.1: undecided ([rae.md](rae.md#what-it-gained-here))",
    ),
    System(
        "MeanFlow",
        ("2505.13447",),
        "none looked at",
        "systems/meanflow.py",
        "--config=digits_few_steps:meanflow",
        "meanflow.md",
        "identity, guidance inside the target and weighting of the loss from the paper, on a flow "
        "whose averages are known",
        "pyramids: the patch is that of the stage in which an interval starts, and intervals over "
        "a boundary have the target of two jumps; the interval enters among the features of time",
        "tests/systems/test_meanflow.py",
        "digits, 2 levels, 3 short seeds: 4 evaluations FID 56.0, a tuned plan of 5 guided steps "
        "34.9; SiT, one seed: 30.6, Euler with 40 37.4 "
        "([meanflow.md](meanflow.md#what-it-gained-here))",
    ),
    System(
        "Guided and progressive distillation",
        ("2210.03142", "2202.00512"),
        "the progressive-distillation release (in devzhk/diffusion_distillation cfffd04) and "
        "diffusers 0.35.2, both Apache-2; of stage one no complete code was found",
        "systems/guided_distillation.py",
        "--config=digits_few_steps:guided",
        "guided_distillation.md",
        "steps, targets, losses, gradients and the embedding of the scale, against arrays of the "
        "originals; stage one and the linear path against a restatement",
        "velocities on the linear path, without weights by SNR; steps end at the boundaries of "
        "the pyramid",
        "tests/systems/test_guided_distillation.py",
        "digits, 2 levels, 3 short seeds: half the time at FID 35.3 (teacher 35.4, tuned plan of "
        "as much time 34.6), two steps 35.5 at a twentieth "
        "([guided_distillation.md](guided_distillation.md#what-it-gained-here))",
    ),
    System(
        "MMD fine-tuning",
        ("2301.07969",),
        "diegovalsesia/MMD-DDM b69d55b, MIT",
        "systems/mmd.py",
        "--config=digits_few_steps:mmd",
        "mmd.md",
        "kernels, the unbiased estimate and its gradient, against arrays of the original; the "
        "gradient through all steps, against differences",
        "features of the network itself before fine-tuning, not of Inception or CLIP: no decoder; "
        "Euler steps of a flow, guided if asked; float32, where the original has float64",
        "tests/systems/test_mmd.py",
        "digits, 2 levels, 3 seeds, four Euler steps: FID 6.2, before 7.8, a tuned plan of as many "
        "evaluations without training 6.2 ([mmd.md](mmd.md#what-it-gained-here))",
    ),
    System(
        "Channels beside the latent",
        ("2112.10752",),
        "CompVis/latent-diffusion a506df5, MIT, read about only",
        "systems/tasks.py",
        "--config.data.task=inpainting",
        "conditions.md",
        "a condition in channels beside the latent equals a wider patch projection; replacement of "
        "known parts, against a NumPy restatement",
        "the latent is masked or shrunk, not the picture before it is encoded: caches can be used",
        "tests/systems/test_tasks.py",
        "unseen digits, 3 seeds: what is told is kept at 31 and 23 dB, 75% and 70% are seen as "
        "the digit they are of ([conditions.md](conditions.md#what-it-does-here))",
    ),
    System(
        "Cascade (LowDiff)",
        ("2509.15342", "2106.15282"),
        "no code of LowDiff found",
        "systems/cascade.py",
        "--config=digits_tasks:cascade",
        "cascade.md",
        "a small sample as a condition in channels, with noise of a fixed level on it, tested "
        "against the mean of squares",
        "two networks, trained apart, in the place of one of all resolutions",
        "tests/systems/test_cascade.py",
        "digits, 3 seeds, at the pyramid's FLOPs: worse, FID 8.2, the pyramid 6.1 and by a tuned "
        "plan of half of them 6.0; more recognised ([cascade.md](cascade.md#beside-the-pyramid))",
    ),
    System(
        "PPCL",
        ("2511.16156",),
        "OPPO-Mente-Lab/Qwen-Image-Pruning 4d054b3, Apache-2",
        "systems/ppcl.py",
        "--config=digits_ppcl",
        "ppcl.md",
        "least squares, both losses, the distillation of intervals and its gradients, against "
        "arrays of the original; probes, CKA and intervals, of which it has no code, against a "
        "restatement",
        "probes, intervals and students are of a stage of the pyramid; a term for the size of the "
        "tokens; one stream of tokens",
        "tests/systems/test_ppcl.py",
        "digits, 2 levels, 3 seeds, 2 of 6 blocks fewer: in the fine stage FID 6.0 at 74% of the "
        "FLOPs, in the coarse stage 6.2 at 93%, whole 6.1; by tuned plans 5.9, 6.1 and 6.1; by CKA "
        "the coarse stage loses least ([ppcl.md](ppcl.md#what-it-found-here))",
    ),
    System(
        "LoRA",
        ("2106.09685", "2312.03732"),
        "huggingface/peft 0.21.2, Apache-2",
        "systems/adapters.py",
        "--config=digits:lora",
        "adapters.md",
        "outputs, gradients, merged weights, where A starts and names, against arrays of the "
        "original; rsLoRA too",
        "no dropout",
        "tests/systems/test_adapters.py",
        "digits, SiT to 2 levels, 3 seeds: FID 7.7 by training 7.3%, 5.4 by training all; "
        "imagenette latents: 3.7 and 3.2 ([adapters.md](adapters.md#what-they-gained-here))",
    ),
    System(
        "DiffFit and BitFit",
        ("2304.06648", "2106.10199"),
        "mkshing/DiffFit-pytorch 78dc2d1, an unofficial port, MIT",
        "systems/adapters.py",
        "--config=digits:difffit",
        "adapters.md",
        "a block, its gradients, what is trained and how many parameters that are, against arrays "
        "of the port",
        "the kernel of adaLN stays as it is, which the port trains by the accident of a name; "
        "epsilon 1e-6 in every norm",
        "tests/systems/test_adapters.py",
        "digits, SiT to 2 levels, 3 seeds: FID 7.8 by training 1.3% or 1.0%, 5.4 by training all; "
        "imagenette latents: 3.9 by 2.6%, 3.2 ([adapters.md](adapters.md#what-they-gained-here))",
    ),
    System(
        "Diffscaler",
        ("2404.09976",),
        "no code found",
        "systems/adapters.py",
        "--config=digits:diffscaler",
        "adapters.md",
        "scale, shift and low-rank part of every layer, other classes from the null class, as the "
        "paper is summarised",
        "a task is a run of its own on one base and is chosen when it is loaded, not by the image",
        "tests/models/test_adapters.py",
        "digits, SiT to 2 levels, 3 seeds: FID 6.4 by training 9.1%, 5.4 by training all "
        "([adapters.md](adapters.md#what-they-gained-here))",
    ),
)


def page() -> str:
    """docs/systems.md."""
    names = [system.name for system in SYSTEMS]
    lines = [
        "# Systems",
        "",
        "The other methods of this field that live on PPFlow's backbone, each in one file, with "
        "what is exact and what it did here. Written by `python -m ppflow_jax.systems`.",
        "",
        "Nothing was copied from the originals: they were run to get numbers to agree with, or "
        "only read about. Their licences are named so that you know under which terms *they* are.",
        "",
        "Beside which a method must pay: on digits plain 2 and 3 levels, sampled by tuned plans of "
        "8 evaluations, have FID 6.1 and 6.3 (3 seeds) at 29% and 24% of the FLOPs of SiT with 20 "
        "Euler steps, which has 10.6. *By tuned plans* below means as many evaluations; all such "
        "rows with their intervals are in [one page](study_parts.md).",
        "",
        ", ".join(f"[{name}](#{_anchor(name)})" for name in names),
    ]
    for system in SYSTEMS:
        papers = ", ".join(f"[{number}]({PAPER}{number})" for number in system.papers)
        lines += [
            "",
            f"## {system.name}",
            "",
            "| | |",
            "|---|---|",
            f"| paper | {papers} |",
            f"| original | {system.original} |",
            f"| use | `{system.use}`, see [{system.page}]({system.page}) |",
            f"| code | `ppflow_jax/{system.file}`, tested in `{system.test}` |",
            f"| exact | {system.exact} |",
            f"| differs | {system.differs} |",
            f"| here | {system.effect} |",
        ]
    lines += ["", "## Which go together", "", *table()]
    return "\n".join(lines) + "\n"


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "-").translate(dict.fromkeys(map(ord, "()+")))
