"""Time of a generated token, megafn beside transformers' generate, in turns.

Prints; never asserts speed. Both generate greedily in one process, with the same weights.
"""

import statistics

import pytest
import torch

import megafn as mf
from turns import take_turns, threads, times_as_fast

LAYERS = 8
HIDDEN = 256
HEADS = 8
VOCABULARY = 8192
BATCH = 4
PROMPT = 64
NEW_TOKENS = 64
ROUNDS = 7
GOAL = 1.2  # times transformers' time


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=LAYERS,
        n_embd=HIDDEN,
        n_head=HEADS,
        n_positions=PROMPT + NEW_TOKENS,
        vocab_size=VOCABULARY,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=LAYERS,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 2,
        intermediate_size=4 * HIDDEN,
        max_position_embeddings=PROMPT + NEW_TOKENS,
        vocab_size=VOCABULARY,
    )
    return LlamaForCausalLM(config)


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        num_layers=LAYERS // 2,
        d_model=HIDDEN,
        d_kv=HIDDEN // HEADS,
        d_ff=4 * HIDDEN,
        num_heads=HEADS,
        vocab_size=VOCABULARY,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config)


@pytest.mark.skipif(torch.cuda.is_available(), reason="compares CPUs")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("make", [gpt2, llama, t5], ids=lambda make: make.__name__)
def test_a_generated_token_beside_transformers(make, table, tmp_path):
    torch.manual_seed(0)
    model = make().eval()
    model.generation_config.eos_token_id = None  # both write all tokens
    model.save_pretrained(tmp_path)
    prompts = torch.randint(1, VOCABULARY, (BATCH, PROMPT))
    config = mf.TrainConfig(
        model=mf.pretrained_model(tmp_path),
        log=mf.LogConfig(progress=False),
        micro_batch_size=1,
        global_batch_size=1,
        train_iters=1,
    )
    generation = mf.GenerationConfig(max_new_tokens=NEW_TOKENS, temperature=0.0)
    with threads(2), mf.init_groups(mf.build_groups(config.parallel, world_size=1)) as pg:
        state = mf.from_pretrained(mf.setup(config, pg), tmp_path)

        def ours():
            return mf.generate(state, prompts, generation).tokens

        def theirs():
            whole = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                pad_token_id=0,
            )
            return tuple(map(tuple, whole[:, -NEW_TOKENS:].tolist()))

        assert ours() == theirs()
        seconds = take_turns({"megafn": ours, "transformers": theirs}, rounds=ROUNDS)
    milliseconds = {
        name: 1e3 * statistics.median(times) / NEW_TOKENS for name, times in seconds.items()
    }
    slower = times_as_fast(seconds["transformers"], seconds["megafn"])
    table(
        f"generate, {make.__name__}, fp32, {LAYERS} layers x {HIDDEN}, batch {BATCH}, prompt "
        f"{PROMPT}: {milliseconds['megafn']:.1f} ms a token, transformers "
        f"{milliseconds['transformers']:.1f} ms: {slower:.2f}x its time (goal {GOAL}x)"
    )
