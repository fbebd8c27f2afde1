"""Print how a model continues a text; of a T5, what it writes after reading it.

Ends at the tokenizer's end of a document, or after --max-new-tokens.

Examples:
  python -m megafn generate runs/7 "The statement"
  python -m megafn generate gpt2 "The statement" --temperature 0.8 --top-p 0.95 --seed 1
  torchrun --nproc-per-node 2 -m megafn generate runs/7 "The statement" --tp 2
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from attrs import define, field

import megafn as mf
from megafn.commands.arguments import add_weights

# What a decoder puts in place of the first bytes of a character whose last ones are to come.
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


def add_arguments(parser: ArgumentParser) -> None:
    add_weights(parser)
    parser.add_argument("prompt", metavar="PROMPT", help="the text to continue")
    parser.add_argument(
        "--tokenizer",
        metavar="TOKENIZER",
        help="bytes, or the path of a tokenizer.json (default: that of the run or the model)",
    )
    parser.add_argument(
        "--max-new-tokens",
        metavar="N",
        type=int,
        default=64,
        help="at most so many tokens (default: %(default)s)",
    )
    parser.add_argument(
        "--temperature",
        metavar="X",
        type=float,
        default=0.0,
        help="0 takes the most likely token each time, 1 samples (default: %(default)s)",
    )
    parser.add_argument(
        "--top-k", metavar="N", type=int, help="sample from so many tokens (default: all)"
    )
    parser.add_argument(
        "--top-p",
        metavar="X",
        type=float,
        default=1.0,
        help="sample from the most likely tokens of this probability (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", metavar="N", type=int, default=0, help="of the sampling (default: %(default)s)"
    )
    parser.add_argument(
        "--tp",
        metavar="N",
        type=int,
        default=1,
        help="tensor-parallel processes (default: %(default)s)",
    )
    parser.add_argument(
        "--pp",
        metavar="N",
        type=int,
        default=1,
        help="pipeline-parallel processes (default: %(default)s)",
    )


def run(arguments: Namespace) -> int:
    path = Path(arguments.path)
    if not path.is_dir():
        raise mf.ConfigError(f"path = {str(path)!r}: there is no such directory; name a checkpoint")
    run_of_checkpoint = mf.checkpoint_config(path)
    config = _config_to_generate(path, run_of_checkpoint, arguments)
    tokenizer = mf.load_tokenizer(arguments.tokenizer or _tokenizer_of(path, run_of_checkpoint))
    ids = tokenizer.encode(arguments.prompt).tolist()
    if run_of_checkpoint is None and config.model.family == "t5" and tokenizer.eos is not None:
        ids.append(tokenizer.eos)  # as transformers' tokenizers end what a T5 reads
    groups = mf.build_groups(config.parallel, mf.world_size(), model=config.model)
    with mf.init_groups(groups) as pg:
        state = mf.from_pretrained(mf.setup(config, pg, for_training=False), path)
        generation = mf.GenerationConfig(
            max_new_tokens=arguments.max_new_tokens,
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            seed=arguments.seed,
            stop_token_ids=_stop_token_ids(tokenizer, config.model),
        )
        printer = _Printer(tokenizer)
        mf.generate(state, [ids], generation, on_token=printer.add)
        if pg.is_rank_zero:
            printer.end()
    return 0


def _config_to_generate(
    path: Path, run_of_checkpoint: mf.TrainConfig | None, arguments: Namespace
) -> mf.TrainConfig:
    """A run of the stored model in the layout of the arguments, that trains nothing."""
    if run_of_checkpoint is None:
        model = mf.pretrained_model(path)
        precision = mf.PrecisionConfig()
        prepare_model = None
    else:
        model = run_of_checkpoint.model
        precision = run_of_checkpoint.precision
        prepare_model = run_of_checkpoint.prepare_model
    parallel = mf.ParallelConfig(tp=arguments.tp, pp=arguments.pp)
    return mf.TrainConfig(
        model=model,
        parallel=parallel,
        precision=precision,
        prepare_model=prepare_model,
        log=mf.LogConfig(progress=False),
        micro_batch_size=1,
        global_batch_size=mf.world_size() // (parallel.tp * parallel.pp) or 1,
        train_iters=1,
    )


def _tokenizer_of(path: Path, run_of_checkpoint: mf.TrainConfig | None) -> str:
    if run_of_checkpoint is None:
        tokenizer = path / "tokenizer.json"
        if not tokenizer.is_file():
            raise mf.ConfigError(
                f"--tokenizer: {path} has no tokenizer.json; give bytes or the path of one"
            )
        return str(tokenizer)
    if run_of_checkpoint.data is None:
        raise mf.ConfigError(
            f"--tokenizer: the run that wrote {path} had batches of its own, and names no "
            "tokenizer; give bytes or the path of a tokenizer.json"
        )
    return run_of_checkpoint.data.tokenizer


def _stop_token_ids(tokenizer: mf.Tokenizer, model: mf.ModelConfig) -> tuple[int, ...]:
    """The end of a document, or of a sequence; ids that the model does not have are left out."""
    ids = {tokenizer.eod, tokenizer.eos}
    return tuple(sorted(i for i in ids if i is not None and 0 <= i < model.vocab_size))


@define
class _Printer:
    """Prints a text as its tokens come, each character once it is complete."""

    tokenizer: mf.Tokenizer
    ids: list[int] = field(factory=list)
    printed: int = 0  # characters

    def add(self, row: int, token: int, logprob: float | None) -> None:
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids)
        if not text.endswith(_INCOMPLETE):
            self._print_from(text)

    def end(self) -> None:
        """Print what is left, and end the line."""
        self._print_from(self.tokenizer.decode(self.ids))
        print(flush=True)

    def _print_from(self, text: str) -> None:
        sys.stdout.write(text[self.printed :])
        sys.stdout.flush()
        self.printed = len(text)
