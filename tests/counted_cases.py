"""What dry runs are compared with real runs on: the layouts, shapes and features of the law.

Of the test modules that hold them to the single process, the lists themselves are used.
"""

import attrs

import megafn as mf
import test_bert
import test_equivalence
import test_features
import test_t5
from bert_rows import MASKED, PAIRS
from combinations import DATA, config_of, smoothed, step_of
from equivalence import recomputation, tiny
from t5_rows import T5

SP = dict(sequence_parallel=True)
DIST = dict(use_distributed_optimizer=True)


@attrs.frozen(kw_only=True)
class Case:
    """A step of one layout, in the pool's words."""

    processes: int
    config: mf.TrainConfig
    data: str
    step: mf.Step
    model: object = None
    # How many the real run does, of which the last one counts.
    steps: int = 1


def case(processes, base, layout, *, data="uneven", section=None, **arguments):
    """A case of two micro-batches, or as many as there are stages.

    base: fields of the model; layout: as in the lists; section: fields of the whole config.
    """
    layout = dict(layout)
    base = {"micro_batch_size": 2, "num_layers": fewest_layers(base, layout)} | base
    config = tiny(**base | layout | recomputation(layout))
    config = few_micro_batches(attrs.evolve(config, **(section or {})), processes)
    step = arguments.pop("step", None) or mf.step_fn(config.model.family)
    return Case(processes=processes, config=config, data=data, step=step, **arguments)


def fewest_layers(base, layout):
    """Two if each model chunk has at least one then."""
    needs_more = (
        "layers_without_rope",
        "num_layers_in_first_pipeline_stage",
        "num_layers_in_last_pipeline_stage",
        "granularity",
    )
    chunks = layout.get("pp", 1) * layout.get("vpp", 1)
    if chunks > 2 or any(field in needs_more for field in (*base, *layout)):
        return 4
    return 2


def few_micro_batches(config, processes):
    parallel = config.parallel
    dp = processes // (parallel.tp * parallel.pp * parallel.cp)
    micro_batches = dp * max(2, parallel.pp)
    return attrs.evolve(config, global_batch_size=config.micro_batch_size * micro_batches)


def of_random(product):
    """The case of one of the random products of `combinations`."""
    return Case(
        processes=product["processes"],
        config=few_micro_batches(config_of(product), product["processes"]),
        data=product["data"],
        step=step_of(product),
    )


def laid_out(name, base, layouts=test_equivalence.LAYOUTS, **arguments):
    """One of the law's layouts with more fields of the model."""
    processes, layout, *of_layout = layouts[name]
    return case(processes, base | (of_layout[0] if of_layout else {}), layout, **arguments)


def of_every_list():
    """{name: case}, some 200 of them."""
    cases = {}
    for name in test_equivalence.LAYOUTS:
        cases[f"gpt {name}"] = laid_out(name, {})
    for name, shape in test_equivalence.SHAPES.items():
        cases[f"{name} tp2-pp2-sp"] = laid_out("tp2-pp2-sp", shape)
        cases[f"{name} tp2-cp2-dist"] = case(4, shape, dict(tp=2, cp=2, **DIST))
    for name in test_bert.LAYOUTS:
        cases[f"bert {name}"] = laid_out(name, MASKED, test_bert.LAYOUTS, data="bert")
        cases[f"bert pairs {name}"] = laid_out(name, PAIRS, test_bert.LAYOUTS, data="bert pairs")
    for name in test_t5.LAYOUTS:
        cases[f"t5 {name}"] = laid_out(name, T5, test_t5.LAYOUTS, data="t5")
    return cases | of_data() | of_precision() | of_users()


def of_data():
    cases = {}
    for name in ("tp2-sp", "pp2", "pp2-vpp2", "cp2", "tp2-pp2-sp"):
        for data in DATA.keys() - {"bert", "bert pairs", "t5"}:
            cases[f"{data} {name}"] = laid_out(name, {}, data=data)
    dropout = dict(hidden_dropout=0.1, attention_dropout=0.1)
    for name in ("tp2-sp", "tp2-cp2-sp", "full-uniform2-tp2-sp", "selective-tp2-cp2", "pp2-vpp2"):
        cases[f"dropout {name}"] = laid_out(name, dropout)
    return cases


def of_precision():
    """fp16 runs on CUDA only."""
    cases = {}
    for name in ("tp2-sp", "pp2-vpp2", "tp2-cp2-dp2-sp-dist", "pp2-dp2-dist", "full-uniform"):
        cases[f"bf16 {name}"] = laid_out(name, dict(dtype="bf16"))
    llama = test_equivalence.LLAMA | dict(dtype="bf16")
    cases["bf16 llama tp2-pp2-sp"] = laid_out("tp2-pp2-sp", llama)
    return cases


def of_users():
    """What users bring: steps, model functions, adapters, optimizers, diagnostics."""
    smoothing = attrs.evolve(mf.step_fn("gpt"), loss=smoothed)
    adapters = mf.lora(rank=4, alpha=8.0, modules=("linear_qkv", "linear_fc1"))
    everything = dict(log=mf.LogConfig(everything=True), return_logits="last_stage")
    cases = {}
    for name in ("tp2-pp2-sp", "pp2-vpp2", "cp2-dp2-dist"):
        cases[f"custom step {name}"] = laid_out(name, {}, step=test_features.OWN)
        cases[f"custom loss {name}"] = laid_out(name, {}, step=smoothing)
        cases[f"model function {name}"] = laid_out(name, {}, model=test_features.louder)
        cases[f"frozen {name}"] = laid_out(name, {}, model=test_features.frozen)
        cases[f"lora {name}"] = laid_out(name, {}, section=dict(prepare_model=adapters))
        if "dist" not in name:
            cases[f"sgd {name}"] = laid_out(name, dict(name="sgd", momentum=0.5, eps=1e-8))
        cases[f"diagnostics {name}"] = laid_out(name, {}, section=everything)
    return cases


CASES = of_every_list()

# Later steps of a run, whose peak is that of a dry run's only step.
THIRD_STEPS = {"third step tp2-pp2-sp": laid_out("tp2-pp2-sp", {}, steps=3)}

# Every axis, family and feature once or twice, in half a minute.
BRIEF = (
    "gpt full-uniform",
    "gpt pp2-vpp2",
    "gpt dp2-dist",
    "gpt pp4",
    "gpt cp2-dp2-dist",
    "gpt pp4-vpp2-dp2-dist",
    "scaled-rope-window tp2-cp2-dist",
    "bert pp2-tp2-sp",
    "bert pairs pp2",
    "t5 tp2-pp2-sp",
    "t5 full-block-pp4",
    "documents cp2",
    "growing pp2-vpp2",
    "dropout selective-tp2-cp2",
    "bf16 llama tp2-pp2-sp",
    "bf16 tp2-cp2-dp2-sp-dist",
    "custom step pp2-vpp2",
    "frozen cp2-dp2-dist",
    "lora tp2-pp2-sp",
)
