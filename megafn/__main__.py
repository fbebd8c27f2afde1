"""The command: `python -m megafn train config.toml`, `... data text prefix`, `... check config.toml`, `... demo`."""

from __future__ import annotations

import argparse
import sys
import warnings


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 with one sentence on standard error where the input is at fault."""
    parser = argparse.ArgumentParser(
        prog="megafn",
        description="Megatron-scale training as functions. Run train and demo under torchrun for several processes.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("train", help="train what a TOML file says")
    command.add_argument("config", help="a file as dump_config writes it")
    command = commands.add_parser(
        "check", help="tell every problem of a TOML file, and draw its pipeline"
    )
    command.add_argument("config")
    command.add_argument("--world-size", type=int, required=True, help="number of processes")
    command = commands.add_parser(
        "data", help="text to indexed data: PREFIX_train, PREFIX_valid, PREFIX_test"
    )
    command.add_argument(
        "text", help='documents separated by form feeds, or .jsonl with a "text" in each line'
    )
    command.add_argument(
        "prefix", help="where to write: folder/name gives folder/name_train.bin, .idx and so on"
    )
    command.add_argument("--tokenizer", default="bytes", help="bytes, or a tokenizer.json")
    command.add_argument(
        "--split",
        default="949,50,1",
        help="weights of train, valid and test; every document is cut",
    )
    command.add_argument(
        "--split-sentences",
        action="store_true",
        help="each sentence a sequence of its document, for BERT and T5",
    )
    command = commands.add_parser(
        "demo",
        help="train a small model on English prose: torchrun --nproc-per-node 4 -m megafn demo",
    )
    command.add_argument("--family", default="gpt", help="gpt, bert or t5")
    command.add_argument(
        "--folder", help="where the logs and the picture go; runs/demo-FAMILY unless given"
    )
    command.add_argument("--iterations", type=int)
    arguments = parser.parse_args(argv)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show
            return {"train": _train, "check": _check, "data": _data, "demo": _demo}[
                arguments.command
            ](arguments)
    except (ValueError, OSError) as error:
        print(
            f"megafn: {error}", file=sys.stderr
        )  # of every process: torchrun ends the others when one has failed
        return 2


def _show(message, category, *_, **__) -> None:
    """A warning as one line, behind which the bar is drawn anew."""
    from tqdm import tqdm

    tqdm.write(f"{category.__name__}: {message}", file=sys.stderr)


def _train(arguments) -> int:
    import megafn as mf

    mf.train(mf.load_config(arguments.config))
    return 0


def _check(arguments) -> int:
    import megafn as mf

    config = mf.load_config(arguments.config)
    problems = mf.validate(config, arguments.world_size)
    if problems:
        print(
            f"{arguments.config} cannot run on {arguments.world_size} processes:",
            *problems,
            sep="\n  ",
        )
        return 1
    parallel, dp = config.parallel, mf.build_groups(config.parallel, arguments.world_size).dp_size
    count = mf.num_micro_batches(config, dp)
    print(
        f"{arguments.config} can run on {arguments.world_size} process{'es' * (arguments.world_size > 1)}: tp {parallel.tp} x pp {parallel.pp} x cp {parallel.cp} x dp {dp}, "
        f"{config.iterations} iterations of {count} micro-batches of {config.micro_batch_size} on each data-parallel rank"
    )
    if parallel.pp > 1:
        print(mf.draw_pipeline(parallel.pp, parallel.vpp, count))
    return 0


def _data(arguments) -> int:
    import megafn as mf

    try:
        split = tuple(float(weight) for weight in arguments.split.split(","))
    except ValueError:
        raise ValueError(
            f"--split = {arguments.split!r}: three numbers are wanted, such as 949,50,1."
        ) from None
    for prefix in mf.index_text(
        arguments.text,
        arguments.prefix,
        tokenizer=arguments.tokenizer,
        split=split,
        split_sentences=arguments.split_sentences,
    ).values():
        print(prefix)
    return 0


def _demo(arguments) -> int:
    from megafn.demo import demo

    demo(folder=arguments.folder, iterations=arguments.iterations, family=arguments.family)
    return 0


if __name__ == "__main__":
    sys.exit(main())
