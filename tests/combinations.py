"""Random products of layout x model x features, each held to the law; a case is a flat dict that a
command line can repeat."""

import json

import attrs
import torch
import torch.distributed as dist
from hypothesis import assume
from hypothesis import strategies as st

import megafn as mf
from bert_rows import MASKED, PAIRS, bert_rows
from equivalence import assert_equal, assert_errs_alike, run_layout, short, uneven
from gpt_rows import alone_rows, document_rows, growing_rows, padded_rows
from megafn.runtime.model.losses import cross_entropy
from planted import planted
from t5_rows import T5, pairs

# What makes a case differ from its single process; everything else both have.
CUT = (
    "pipeline_model_parallel_split_rank",
    "tp",
    "pp",
    "vpp",
    "cp",
    "order",
    "sequence_parallel",
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
)
HOW = ("use_distributed_optimizer", "granularity", "method")


# --------------------------------------------------------------------------------------------- data


def lopsided(config, iteration):
    """Only the last quarter of each sequence counts: under context parallelism some ranks hold none
    of it."""
    rows = uneven(config, iteration)
    for row in rows:
        row["loss_mask"] = (
            torch.arange(config.model.seq_length) >= config.model.seq_length * 3 // 4
        ).float()
    return rows


def alone(config, iteration):
    """One token of the whole global batch counts, another in each iteration."""
    return alone_rows(
        config, iteration, row=iteration % config.global_batch_size, position=-1 - iteration
    )


DATA = {
    "uneven": uneven,
    "lopsided": lopsided,
    "alone": alone,
    "padded": padded_rows,
    "documents": document_rows,
    "growing": growing_rows,
    "bert": bert_rows,
    "bert pairs": bert_rows,
    "t5": pairs,
}
# GPT for any other data.
MODELS = {"bert": MASKED, "bert pairs": PAIRS, "t5": T5}


def whole_sum(here, pg):
    """The sum over tp of each rank's value; the gradient is that of one's own."""
    whole = here.detach().clone()
    dist.all_reduce(whole, group=pg.tp)
    return here + (whole - here.detach())


def smoothed(logits, batch, pg):
    """Cross-entropy with labels smoothed by 0.1 over the whole vocabulary (arXiv 1512.00567), which
    is cut over tp."""
    real = torch.arange(logits.size(-1)) + pg.place.tp * logits.size(-1) < 97
    mean = whole_sum((logits.float() * real).sum(-1), pg).t() / 97
    losses = 0.9 * cross_entropy(logits, batch["labels"], pg) + 0.1 * (
        mf.logsumexp(logits, pg) - mean
    )
    return mf.Loss(sum=(losses * batch["loss_mask"]).sum(), count=batch["loss_mask"].sum())


# -------------------------------------------------------------------------------------------- cases


def config_of(case):
    """The config of a case; its processes, data and loss are no part of that."""
    case = MODELS.get(case["data"], {}) | {
        key: value for key, value in case.items() if key not in ("processes", "data", "smoothing")
    }
    recompute = mf.RecomputeConfig(
        **{key: case.pop(key) for key in ("granularity", "method") if key in case}
    )
    if "rope_scaling" in case:
        # of 4 frequencies one stays, one is divided, two lie between
        case["rope_scaling"] = mf.RopeScaling(
            factor=case["rope_scaling"], high_freq_factor=40.0, original_max_position_embeddings=512
        )
    if "layers_without_rope" in case:
        case["layers_without_rope"] = tuple(case["layers_without_rope"])
    return short(**dict(recompute=recompute) | case)


def reference_of(case):
    """The case that it is held to: the single process, or, with dropout, the same layout with
    nothing sharded or recomputed."""
    if case.get("hidden_dropout") or case.get("attention_dropout"):
        return {key: value for key, value in case.items() if key not in HOW}
    return {key: value for key, value in case.items() if key not in CUT + HOW} | {"processes": 1}


@st.composite
def cases(draw, processes=(2, 2, 2, 4, 4, 4, 4, 8), data=tuple(DATA)):
    """A case that `validate` accepts; simpler ones come first, so that a failure shrinks to few
    features."""
    case = {"processes": draw(st.sampled_from(processes))}
    left = case["processes"]
    case["data"] = draw(st.sampled_from(data))
    for axis in draw(st.permutations(["tp", "pp", "cp"])):
        size = draw(st.sampled_from([n for n in (1, 2, 4) if left % n == 0 and n <= left]))
        left //= size
        if size > 1:
            case[axis] = size

    def maybe(name, *values):
        """A field is left as it is by default, or takes one of these."""
        value = draw(st.sampled_from((None, *values)))
        if value is not None:
            case[name] = value

    if case.get("tp"):
        maybe("sequence_parallel", True)
    if case.get("pp"):
        if case["data"] != "t5":
            maybe("vpp", 2)
        if case["pp"] * case.get("vpp", 1) > 4:
            case["num_layers"] = 8
        elif case["pp"] == 2 and not case.get("vpp"):
            maybe("num_layers_in_first_pipeline_stage", 1, 3)
    maybe("order", "pp-dp-cp-ep-tp", "dp-cp-tp-pp-ep", "cp-tp-pp-dp-ep")
    if left > 1:
        maybe("use_distributed_optimizer", True, True)
    maybe("granularity", "selective", "full")
    if case.get("granularity") == "full":
        maybe("method", "block")
    maybe("tie_word_embeddings", False)
    maybe("position_embedding", "rope", "none")
    maybe("normalization", "RMSNorm")
    maybe("activation", "swiglu", "geglu")
    maybe("num_query_groups", 2, 4)
    # without rotation, softmax is blind to the keys' bias, whose gradient is rounding
    if case.get("position_embedding") == "rope":
        maybe("qk_layernorm", True)
        maybe("rope_scaling", 8.0)
    maybe("softmax_scale", 0.7)
    if case["data"] == "t5":
        maybe("scale_decoder_outputs", True)
        maybe("output_layer_bias", False)
    elif case["data"] not in MODELS:
        maybe("sliding_window", 5, 20)
        maybe("parallel_residual", True)
        if case.get("position_embedding") == "rope" and not case.get("qk_layernorm"):
            maybe("layers_without_rope", [1], [0, 3])
    maybe("add_bias_linear", False)
    maybe("clip_grad", 0.0, 0.1)
    maybe("micro_batch_size", 1)
    if case["data"] == "t5" and case.get("pp") == 4:
        maybe("pipeline_model_parallel_split_rank", 1, 3)
    if case["data"] not in MODELS:
        maybe("smoothing", True)
    if case.keys() & {"use_distributed_optimizer", "granularity"}:
        maybe("hidden_dropout", 0.1)
        maybe("attention_dropout", 0.1)
    if (
        not case.keys() & {"hidden_dropout", "attention_dropout", "smoothing"}
        and case["data"] == "uneven"
    ):
        maybe("dtype", "bf16")
    assume(mf.validate(config_of(case), case["processes"]) == ())
    return case


def run_case(case, bug=None):
    """In the workers: trains a case, with a planted bug if one is named."""
    with planted(bug):
        return run_layout(config_of(case), DATA[case["data"]], step_of(case))


def step_of(case):
    step = mf.step_fn(config_of(case).model.family)
    return attrs.evolve(step, loss=smoothed) if case.get("smoothing") else step


def hold(case, pool, references, bug=None):
    """Raises AssertionError where a case breaks the law, with the command that repeats it.
    references: a dict that is filled."""

    def reference(base):
        key = json.dumps(base, sort_keys=True)
        if key not in references:
            references[key] = pool(base["processes"], run_case, base)
        return references[key]

    base = reference_of(case)
    ones = reference(base)
    try:
        results = pool(case["processes"], run_case, case, bug)
        if case.get("dtype") == "bf16":
            assert_errs_alike(*reference(base | {"dtype": "fp32"}), *ones, results)
        elif base["processes"] == 1:
            assert_equal(*ones, results)
        else:
            for one, other in zip(ones, results, strict=True):
                assert_equal(one, [as_whole(other)])
    except Exception as error:
        error.add_note(
            "repeat it: python -m pytest tests/test_fuzz.py -k given_case "
            f"--case '{json.dumps(case)}'"
        )
        raise


def as_whole(result):
    """A rank's result, in which what it holds of each parameter counts as the whole: another run of
    the layout has the same there."""
    curve, *ends = result
    return curve, *(
        [(name, value, tuple(value.shape), None, 1, 1, 0) for name, value, *_ in end]
        for end in ends
    )
