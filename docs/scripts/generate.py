"""Text out of a model, in a training layout.

Run: torchrun --nproc-per-node 2 generate.py SOURCE
"""

import sys

import megafn as mf

source = sys.argv[1]

config = mf.TrainConfig(
    model=mf.pretrained_model(source),
    parallel=mf.ParallelConfig(tp=2),
    micro_batch_size=1,
    global_batch_size=1,
    train_iters=1,
)

greedy = mf.GenerationConfig(max_new_tokens=16, temperature=0.0)

if __name__ == "__main__":
    tokenizer = mf.load_tokenizer(f"{source}/tokenizer.json")
    texts = ("The statement", "A class is an object that")
    prompts = [tokenizer.encode(text) for text in texts]  # of different lengths
    sampling = mf.GenerationConfig(
        max_new_tokens=16,
        temperature=0.8,
        top_k=50,
        top_p=0.95,
        seed=1,
        stop_token_ids=(tokenizer.eod,),
        logprobs=True,
    )
    groups = mf.build_groups(config.parallel, mf.world_size(), model=config.model)
    with mf.init_groups(groups) as pg:
        state = mf.from_pretrained(mf.setup(config, pg), source)
        likeliest = mf.generate(state, prompts, greedy)
        sampled = mf.generate(state, prompts, sampling)
        if pg.is_rank_zero:
            for tokens, logprobs in zip(sampled.tokens, sampled.logprobs, strict=True):
                print(repr(tokenizer.decode(tokens)), sum(logprobs))
        # new tokens, one tuple a prompt
        assert all(len(tokens) == 16 for tokens in likeliest.tokens)
